// A square of sums in memory, of which a few rows at a time are in registers: a vector has a pair of each column.

#pragma once

#include <cstdint>

#include "lanes.hpp"

namespace {

// Any thread can have squares: these are memory.
struct Ready {
  Ready() {}
};

class Square {
  float* at;
  int64_t ld;
  bool is_new;

 public:
  Square(float* at, int64_t ld, bool is_new) : at(at), ld(ld), is_new(is_new) {}
  void done() {}

  // Adds a b, all columns or half of them. Twelve rows by two vectors of columns, or sixteen by one, and what they are
  // made of, are the registers there are.
  template <int halves = 2>
  void add(Rows a, Pairs b, int64_t depth) {
    if constexpr (halves == 2) add<12, 2>(0, a, b, depth), add<12, 2>(12, a, b, depth), add<8, 2>(24, a, b, depth);
    else add<16, 1>(0, a, b, depth), add<16, 1>(16, a, b, depth);
    is_new = false;
  }

 private:
  template <int high, int wide>
  __attribute__((noinline)) void add(int64_t row, Rows a, Pairs b, int64_t depth) {
    __m512 sum[high][wide] = {};
    float* to = at + row * ld;
    a.at += row * a.across;
    if (!is_new)
#pragma GCC unroll 16
      for (int i = 0; i < high; i++)
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) sum[i][j] = _mm512_loadu_ps(to + i * ld + j * LANES);
    for (int64_t p = 0; p < depth; p += SIDE, a.at += a.next) {
      const uint16_t* fours[4] = {a.at, a.at + 4 * a.across, a.at + 8 * a.across, a.at + 12 * a.across};
      if (a.asks)
#pragma GCC unroll 16
        for (int i = 0; i < high; i++) _mm_prefetch(fours[i / 4] + (i % 4 + 32) * a.across, _MM_HINT_T1);
      // So many to begin from, and three strides: with an address for each row, there are not registers enough.
      __asm__("" : "+r"(fours[0]), "+r"(fours[1]), "+r"(fours[2]));
      if constexpr (high > 12) __asm__("" : "+r"(fours[3]));
      for (int64_t pair = 0; pair < SIDE && pair < depth - p; pair += 2, b.at += b.stride) {
        __m512bh right[wide];
#pragma GCC unroll 2
        for (int j = 0; j < wide; j++) right[j] = read<__m512bh>(b.at + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < high; i++) {
          const __m512bh two = (__m512bh)_mm512_set1_epi32(read<int32_t>(fours[i / 4] + i % 4 * a.across + pair));
#pragma GCC unroll 2
          for (int j = 0; j < wide; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], two, right[j]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < high; i++)
#pragma GCC unroll 2
      for (int j = 0; j < wide; j++) _mm512_storeu_ps(to + i * ld + j * LANES, sum[i][j]);
  }
};

}  // namespace
