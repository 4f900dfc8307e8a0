// Products of bf16, summed in fp32: 32 rows by 32 columns at a time, by AMX's tiles or by vectors of pairs.
//
// The right factor lies in pairs of rows: a number of one and that below it are one word.

#pragma once

#include <cstdint>

#include "lanes.hpp"

namespace {

constexpr int64_t SIDE = 32;  // rows, columns and depth are whole numbers of it

inline int64_t whole(int64_t count) { return (count + SIDE - 1) / SIDE * SIDE; }

// The left factor: from one row to the next, and from one SIDE of its depth to the next; whether the rows below are
// asked for, as they are far away and come next.
struct Rows {
  const uint16_t* at;
  int64_t across, next = SIDE;
  bool asks = false;
};
struct Pairs {
  const uint32_t* at;
  int64_t stride;
};

}  // namespace

#if defined(__AMX_BF16__)
#include "amx.hpp"
#else
#include "pairs.hpp"
#endif

namespace {

// c += a b; c = a b if it is new.
template <bool is_new>
void product(Rows a, Pairs b, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ld) {
  for (int64_t column = 0; column < columns; column += SIDE)
    for (int64_t row = 0; row < rows; row += SIDE) {
      Square square(c + row * ld + column, ld, is_new);
      square.add({a.at + row * a.across, a.across, a.next}, {b.at + column, b.stride}, depth);
      square.done();
    }
}

// A table of words turned over its diagonal, 16 by 16.
[[maybe_unused]] void turned(const void* from, int64_t rows, int64_t columns, int64_t ld, void* to, int64_t to_ld) {
  const uint32_t* x = static_cast<const uint32_t*>(from);
  uint32_t* y = static_cast<uint32_t*>(to);
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t column = 0; column < columns; column += 16) {
      __m512i by2[16], by4[16];
      for (int i = 0; i < 16; i += 2) {
        const __m512i above = _mm512_loadu_si512(x + (row + i) * ld + column);
        const __m512i below = _mm512_loadu_si512(x + (row + i + 1) * ld + column);
        by2[i] = _mm512_unpacklo_epi32(above, below), by2[i + 1] = _mm512_unpackhi_epi32(above, below);
      }
      for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
          by4[i + 2 * j] = _mm512_unpacklo_epi64(by2[i + j], by2[i + j + 2]);
          by4[i + 2 * j + 1] = _mm512_unpackhi_epi64(by2[i + j], by2[i + j + 2]);
        }
      for (int j = 0; j < 4; j++) {  // quarter q of by4[i + j] has rows i to i + 3 of column 4 q + j
        const __m512i even = _mm512_shuffle_i32x4(by4[j], by4[4 + j], 0x88);
        const __m512i even2 = _mm512_shuffle_i32x4(by4[8 + j], by4[12 + j], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(by4[j], by4[4 + j], 0xdd);
        const __m512i odd2 = _mm512_shuffle_i32x4(by4[8 + j], by4[12 + j], 0xdd);
        uint32_t* at = y + (column + j) * to_ld + row;
        _mm512_storeu_si512(at, _mm512_shuffle_i32x4(even, even2, 0x88));
        _mm512_storeu_si512(at + 4 * to_ld, _mm512_shuffle_i32x4(odd, odd2, 0x88));
        _mm512_storeu_si512(at + 8 * to_ld, _mm512_shuffle_i32x4(even, even2, 0xdd));
        _mm512_storeu_si512(at + 12 * to_ld, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
      }
    }
}

// Of two rows of 32 numbers, two of 16 words: each number of the first row, and above it that of the second.
alignas(64) constexpr uint16_t ORDER[2][32] = {
    {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};

inline void paired(__m512i first, __m512i second, uint32_t* to) {
  for (int half = 0; half < 2; half++)
    _mm512_storeu_si512(to + 16 * half,
                        _mm512_permutex2var_epi16(first, _mm512_load_si512(ORDER[half]), second));
}

// A SIDE of numbers as bf16.
inline __m512i rounded(floats left, floats right) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
}

constexpr __mmask16 ALL = 0xffff;

inline __m512i sum_of(__m512i x, __m512i y) { return (__m512i)((floats)x + (floats)y); }

// Sixteen vectors, each summed: the same lanes meet in the same order, wherever a vector stands. (Masks of
// all lanes: without any, GCC warns of its own header.)
inline floats totals(const __m512 (&v)[16]) {
  __m512i by2[8], by4[4], by8[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m512i x = (__m512i)v[i / 4 * 8 + i % 4], y = (__m512i)v[i / 4 * 8 + i % 4 + 4];
    by2[i] = sum_of(_mm512_maskz_shuffle_i32x4(ALL, x, y, 0x44), _mm512_maskz_shuffle_i32x4(ALL, x, y, 0xee));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++) {
    const __m512i x = by2[i], y = by2[i + 4];
    by4[i] = sum_of(_mm512_maskz_shuffle_i32x4(ALL, x, y, 0x88), _mm512_maskz_shuffle_i32x4(ALL, x, y, 0xdd));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; i++) {
    const __m512i x = by4[2 * i], y = by4[2 * i + 1];
    by8[i] = sum_of(_mm512_maskz_unpacklo_epi32(ALL, x, y), _mm512_maskz_unpackhi_epi32(ALL, x, y));
  }
  const __m512i x = by8[0], y = by8[1];
  return (floats)sum_of(_mm512_maskz_unpacklo_epi64(0xff, x, y), _mm512_maskz_unpackhi_epi64(0xff, x, y));
}

// All rows of a table of bf16, in pairs.
[[maybe_unused]] void paired(const uint16_t* x, int64_t rows, int64_t columns, int64_t ld, uint32_t* to, int64_t to_ld) {
  for (int64_t row = 0; row < rows; row += 2)
    for (int64_t column = 0; column < columns; column += 32)
      paired(_mm512_loadu_si512(x + row * ld + column), _mm512_loadu_si512(x + (row + 1) * ld + column),
             to + row / 2 * to_ld + column);
}

constexpr float FIT[5] = {1.f, 0.69312105f, 0.24022349f, 0.05592198f, 0.00966637f};  // by Chebyshev's points

// 2 ** x within 4e-6 of itself, far nearer than bf16 tells apart: by a polynomial for what is left of the nearest whole.
inline floats power_of_two(floats x) {
  const __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const floats rest = x - (floats)whole;
  floats sum = FIT[4] - floats{};
  for (int i = 3; i >= 0; i--) sum = add_product(sum, rest, FIT[i] - floats{});
  return (floats)_mm512_scalef_ps((__m512)sum, whole);
}

}  // namespace
