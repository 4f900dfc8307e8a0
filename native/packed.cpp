// Packed matrices: unpacked into plain numbers, and multiplied with a few rows as they are read.
//
// w = levels[code] * scale (+ offset), with one scale (and offset) for a block of numbers. Codes lie row after row, the
// first in the highest bits of a byte; three bits are a plane of two and a plane of one (deltaw/weights/bits.py).
// Compiled once for every instruction set (CMakeLists.txt); what is unpacked is the same to the last bit on each.

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOINED(name, set) name##_##set
#define NAMED(name, set) JOINED(name, set)
#define FOR_THIS_SET(name) NAMED(name, INSTRUCTION_SET)

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

enum Kind : int32_t { NONE, FP32, FP16, NESTED };

// As deltaw/kernels/packed.py lays it out.
struct Matrix {
  const uint8_t* codes;
  const float* levels;    // of 2**width codes; null: a code stands for itself
  const void* scale;      // a block: fp32, fp16, or 8-bit codes into `nested`
  const void* offset;     // a block: fp32 or fp16
  const float* nested;    // 256 values
  const float* most;      // of 256 scales: times the nested value
  const float* mean;      // one number: added to it
  int64_t rows, columns, block;
  int32_t width, scale_kind, offset_kind;
};

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

inline float number(const void* at, int32_t kind, int64_t i) {
  return kind == FP32 ? static_cast<const float*>(at)[i] : of_half(static_cast<const uint16_t*>(at)[i]);
}

inline float scale_of(const Matrix& m, int64_t block) {
  if (m.scale_kind != NESTED) return number(m.scale, m.scale_kind, block);
  float taken = m.nested[static_cast<const uint8_t*>(m.scale)[block]] * m.most[block >> 8];
  return taken + m.mean[0];
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

template <int width>
inline bits codes_at(const Matrix& m, const uint8_t* plane, int64_t i) {
  if constexpr (width == 3) return pieces<2>(m.codes, i) | pieces<1>(plane, i) << 2;
  return pieces<width == 3 ? 2 : width>(m.codes, i);
}

// The levels of codes; a table of sixteen stays in registers.
struct Table {
  const float* levels;
#if defined(__AVX512F__)
  __m512 all = _mm512_setzero_ps();
  Table(const float* given, bool few) : levels(given) {
    if (few) all = _mm512_loadu_ps(given);
  }
#elif defined(__AVX2__)
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
  Table(const float* given, bool few) : levels(given) {
    if (few) low = _mm256_loadu_ps(given), high = _mm256_loadu_ps(given + 8);
  }
#else
  Table(const float* given, bool) : levels(given) {}
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
    for (int lane = 0; lane < LANES; lane++) found[lane] = levels[codes[lane]];
    return found;
#endif
  }
};

inline floats add_product(floats x, floats y, floats sum) {
#if defined(__AVX512F__)
  return (floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__AVX2__)
  return (floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
  return sum + x * y;
#endif
}

// Calls take(column, numbers) along one row. `exact`: to the last bit as torch has them.
template <int width, bool coded, bool shifted, bool exact, typename Take>
inline void along(const Matrix& m, const Table& table, int64_t row, Take take) {
  const uint8_t* plane = m.codes + (m.rows * m.columns * 2 + 7) / 8;
  const int64_t first = row * m.columns;
  int64_t column = 0;
  for (int64_t block = first / m.block; column < m.columns; block++) {
    const int64_t until = (block + 1) * m.block - first, end = until < m.columns ? until : m.columns;
    const floats scale = scale_of(m, block) - floats{};
    const floats offset = shifted ? number(m.offset, m.offset_kind, block) - floats{} : floats{};
    for (; column < end; column += LANES) {
      const bits codes = codes_at<width>(m, plane, first + column);
      const floats level = coded ? table.at<width>(codes) : __builtin_convertvector((ints)codes, floats);
      take(column, !shifted ? level * scale : exact ? level * scale + offset : add_product(level, scale, offset));
    }
  }
}

inline void put(void* out, int64_t at, floats w, bool bf16) {
  if (!bf16) {
    memcpy(static_cast<float*>(out) + at, &w, sizeof w);
    return;
  }
  bits whole = (bits)w;
  whole = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;  // to the nearest, of two the even
  halves upper = __builtin_convertvector(whole, halves);
  memcpy(static_cast<uint16_t*>(out) + at, &upper, sizeof upper);
}

template <int width, bool coded, bool shifted>
void unpack_rows(const Matrix& m, void* out, bool bf16, int threads) {
  const Table table(m.levels, coded && width < 8);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < m.rows; row++)
    along<width, coded, shifted, true>(m, table, row, [&](int64_t column, floats w) {
      put(out, row * m.columns + column, w, bf16);
    });
}

template <int width, bool coded, bool shifted, int count>
void multiply_rows(const Matrix& m, const float* x, float* y, int threads) {
  const Table table(m.levels, coded && width < 8);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < m.rows; row++) {
    floats sums[count] = {};
    along<width, coded, shifted, false>(m, table, row, [&](int64_t column, floats w) {
      for (int n = 0; n < count; n++)
        sums[n] = add_product(w, read<floats>(x + n * m.columns + column), sums[n]);
    });
    for (int n = 0; n < count; n++) {
      float sum = 0;
      for (int lane = 0; lane < LANES; lane++) sum += sums[n][lane];
      y[n * m.rows + row] = sum;
    }
  }
}

template <int width, bool coded, bool shifted>
void multiply(const Matrix& m, const float* x, float* y, int count, int threads) {
  for (int n = 0; n < count;) {  // eight, four, two rows and one, as often as they fit
    const float* from = x + n * m.columns;
    float* to = y + n * m.rows;
    const int left = count - n;
    if (left >= 8) multiply_rows<width, coded, shifted, 8>(m, from, to, threads), n += 8;
    else if (left >= 4) multiply_rows<width, coded, shifted, 4>(m, from, to, threads), n += 4;
    else if (left >= 2) multiply_rows<width, coded, shifted, 2>(m, from, to, threads), n += 2;
    else multiply_rows<width, coded, shifted, 1>(m, from, to, threads), n += 1;
  }
}

}  // namespace

extern "C" {

#define CASES(call)                                                                                    \
  switch (m->width) {                                                                                  \
    case 2: if (m->levels) call(2, true, false) else call(2, false, true) break;                       \
    case 3: if (m->levels) call(3, true, false) else call(3, false, true) break;                       \
    case 4: if (m->levels) call(4, true, false) else call(4, false, true) break;                       \
    case 8: if (m->levels) call(8, true, false) else call(8, false, true) break;                       \
  }

// Writes rows x columns numbers, as fp32 or bf16.
void FOR_THIS_SET(unpack)(const Matrix* m, void* out, int bf16, int threads) {
#define UNPACK(width, coded, shifted) { unpack_rows<width, coded, shifted>(*m, out, bf16, threads); }
  CASES(UNPACK)
}

// y_NO = x_NI W' for a few rows, in fp32.
void FOR_THIS_SET(multiply)(const Matrix* m, const float* x, float* y, int count, int threads) {
#define MULTIPLY(width, coded, shifted) { multiply<width, coded, shifted>(*m, x, y, count, threads); }
  CASES(MULTIPLY)
}
}
