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

  // Adds a b. Twelve rows by two vectors of columns, and what they are made of, are the registers there are.
  void add(Rows a, Pairs b, int64_t depth) {
    add<12>(0, a, b, depth), add<12>(12, a, b, depth), add<8>(24, a, b, depth);
    is_new = false;
  }

 private:
  template <int high>
  __attribute__((noinline)) void add(int64_t row, Rows a, Pairs b, int64_t depth) {
    __m512 sum[high][2] = {};
    float* to = at + row * ld;
    a.at += row * a.across;
    if (!is_new)
#pragma GCC unroll 12
      for (int i = 0; i < high; i++)
        sum[i][0] = _mm512_loadu_ps(to + i * ld), sum[i][1] = _mm512_loadu_ps(to + i * ld + LANES);
    for (int64_t p = 0; p < depth; p += SIDE, a.at += a.next) {
      const uint16_t* fours[3] = {a.at, a.at + 4 * a.across, a.at + 8 * a.across};
      // Three to begin from, and three strides: with an address for each row, there are not registers enough.
      __asm__("" : "+r"(fours[0]), "+r"(fours[1]), "+r"(fours[2]));
      for (int64_t pair = 0; pair < SIDE && pair < depth - p; pair += 2, b.at += b.stride) {
        const __m512bh left = read<__m512bh>(b.at), right = read<__m512bh>(b.at + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < high; i++) {
          const __m512bh two = (__m512bh)_mm512_set1_epi32(read<int32_t>(fours[i / 4] + i % 4 * a.across + pair));
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], two, left), sum[i][1] = _mm512_dpbf16_ps(sum[i][1], two, right);
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < high; i++)
      _mm512_storeu_ps(to + i * ld, sum[i][0]), _mm512_storeu_ps(to + i * ld + LANES, sum[i][1]);
  }
};

}  // namespace
