// As many numbers at once as the instruction set has lanes for. Included once for every set, each with its own.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// What a function of C is called in the object that is compiled for one set.
#define JOINED(name, set) name##_##set
#define NAMED(name, set) JOINED(name, set)
#define FOR_THIS_SET(name) NAMED(name, INSTRUCTION_SET)

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
#if defined(__AVX2__)
constexpr bool WIDENS = true;  // bytes to lanes by one instruction
#else
constexpr bool WIDENS = false;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

inline float of_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  uint32_t whole = uint32_t(half & 0x7fff) << 13;
  if ((half & 0x7c00) == 0x7c00) whole |= 0x7f800000;
  float value;
  memcpy(&value, &whole, 4);
  if ((half & 0x7c00) != 0x7c00) value *= 0x1p112f;
  return half & 0x8000 ? -value : value;
#endif
}

template <typename T>
inline T read(const void* at) {
  T value;
  memcpy(&value, at, sizeof value);
  return value;
}

// As many pieces of 1, 2, 4 or 8 bits as there are lanes; the first is number `i` of a plane.
template <int piece>
inline bits pieces(const uint8_t* plane, int64_t i) {
  const uint8_t* at = plane + i * piece / 8;
  if constexpr (piece == 8) {
#if defined(__AVX512F__)
    return (bits)_mm512_cvtepu8_epi32(read<__m128i>(at));
#elif defined(__AVX2__)
    return (bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
#else
    return __builtin_convertvector(read<bytes>(at), bits);
#endif
  }
#if defined(__AVX512F__)
  if constexpr (piece == 4) {  // a byte in every pair of lanes: its upper half to the first, its lower to the second
    __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)at));
    pair = _mm512_or_si512(_mm512_srli_epi64(pair, 4), _mm512_slli_epi64(pair, 32));
    return (bits)pair & 15;
  }
#endif
  uint32_t word = 0;
  memcpy(&word, at, LANES * piece / 8);
  bits shift;
  for (int lane = 0; lane < LANES; lane++) shift[lane] = lane * piece / 8 * 8 + 8 - piece - lane * piece % 8;
  return (word - bits{}) >> shift & ((1u << piece) - 1);
}

constexpr float WHOLE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The levels of codes, of which only the lowest bits count; a table of sixteen stays in registers.
struct Table {
  const float* levels;
#if defined(__AVX512F__)
  __m512 all = _mm512_setzero_ps();
  Table(const float* given, bool few) : levels(given ? given : WHOLE) {
    if (few) all = _mm512_loadu_ps(levels);
  }
#elif defined(__AVX2__)
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
  Table(const float* given, bool few) : levels(given ? given : WHOLE) {
    if (few) low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8);
  }
#else
  Table(const float* given, bool) : levels(given ? given : WHOLE) {}
#endif

  template <int width>
  inline floats at(bits codes) const {
#if defined(__AVX512F__)
    if constexpr (width < 8) return (floats)_mm512_permutexvar_ps((__m512i)codes, all);
    return (floats)_mm512_i32gather_ps((__m512i)codes, levels, 4);
#elif defined(__AVX2__)
    if constexpr (width == 8) return (floats)_mm256_i32gather_ps(levels, (__m256i)codes, 4);
    __m256 lower = _mm256_permutevar8x32_ps(low, (__m256i)codes);
    if constexpr (width < 4) return (floats)lower;
    __m256 upper = _mm256_permutevar8x32_ps(high, (__m256i)codes), second = (__m256)(codes << 28);  // bit 3 as a sign
    return (floats)_mm256_blendv_ps(lower, upper, second);
#else
    floats found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = levels[codes[lane] & ((1u << width) - 1)];
    return found;
#endif
  }
};

// Numbers as they are stored: fp32, or bf16 as its bits.
inline floats load(const float* at) { return read<floats>(at); }
inline floats load(const uint16_t* at) { return (floats)(__builtin_convertvector(read<halves>(at), bits) << 16); }

inline float plain(float x) { return x; }
inline float plain(uint16_t x) {
  const uint32_t whole = uint32_t(x) << 16;
  float value;
  memcpy(&value, &whole, 4);
  return value;
}

inline void store(float* at, floats x) { memcpy(at, &x, sizeof x); }
inline void store(uint16_t* at, floats x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  bits whole = (bits)x;
  whole = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;  // to the nearest, of two the even
  const halves upper = __builtin_convertvector(whole, halves);
  memcpy(at, &upper, sizeof upper);
#endif
}

// The first `left` of them, where there are no more, and `filling` behind.
template <typename T>
inline floats load(const T* at, int64_t left, float filling) {
  if (left >= LANES) return load(at);
  T some[LANES] = {};
  memcpy(some, at, sizeof(T) * left);
  floats x = load(some);
  for (int64_t lane = left; lane < LANES; lane++) x[lane] = filling;
  return x;
}

template <typename T>
inline void store(T* at, floats x, int64_t left) {
  if (left >= LANES) return store(at, x);
  T some[LANES];
  store(some, x);
  memcpy(at, some, sizeof(T) * left);
}

inline floats add_product(floats x, floats y, floats sum) {
#if defined(__AVX512F__)
  return (floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__AVX2__)
  return (floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
  return sum + x * y;
#endif
}

inline floats largest(floats x, floats y) { return x > y ? x : y; }

inline float largest_of_all(floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float most = x[0];
  for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
  return most;
}

// exp(x) within 2e-7 of itself: 2**n by its bits, and e**r of what is left by a polynomial (Cephes' expf). Of what is no
// number it is none.
inline floats exponential(floats given) {
  constexpr float MAGIC = 12582912.f;  // 1.5 * 2**23: a sum with it has its whole part in its lowest bits
  floats x = given > -87.f ? given : -87.f + floats{};
  x = x < 88.f ? x : 88.f + floats{};
  const floats shifted = add_product(x, 1.44269504f + floats{}, MAGIC + floats{}), n = shifted - MAGIC;
  const floats r = add_product(n, 2.12194440e-4f + floats{}, add_product(n, -0.693359375f + floats{}, x));
  floats sum = 1.9875691500e-4f + floats{};
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = add_product(sum, r, next + floats{});
  sum = add_product(sum, r * r, r + 1);
  return given == given ? (floats)((bits)sum + ((bits)shifted << 23)) : given;
}

inline float total(floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sums[LANES];
  memcpy(sums, &v, sizeof v);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
  return sums[0];
#endif
}

}  // namespace
