// Products of small matrices in fp32, a few rows and two vectors of columns at a time.

#pragma once

#include <algorithm>

#include "lanes.hpp"

namespace {

constexpr int64_t WIDE = 2 * LANES;  // columns that a tile has

// c[i] += sum over p of a[i * across + p * along] * b[p], of M rows and WIDE columns.
template <int M>
void tile(const float* a, int64_t across, int64_t along, const float* b, int64_t stride, int64_t depth, float* c,
          int64_t ld) {
  floats sum[M][2];
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) sum[i][0] = load(c + i * ld), sum[i][1] = load(c + i * ld + LANES);
  for (int64_t p = 0; p < depth; p++, a += along, b += stride) {
    const floats left = load(b), right = load(b + LANES);
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
      const floats by = a[i * across] - floats{};
      sum[i][0] = add_product(by, left, sum[i][0]), sum[i][1] = add_product(by, right, sum[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) store(c + i * ld, sum[i][0]), store(c + i * ld + LANES, sum[i][1]);
}

// How the numbers of a factor lie: rows of the left one and what is summed over, or what is summed over and columns.
struct Left {
  const float* at;
  int64_t across, along;
};
struct Right {
  const float* at;
  int64_t stride, next;  // from one row to the next, from one WIDE of columns to the next
};

// c += a b
void product(Left a, Right b, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ld) {
  for (int64_t column = 0; column < columns; column += WIDE, b.at += b.next)
    for (int64_t row = 0; row < rows; row += 6) {
      const float* from = a.at + row * a.across;
      float* to = c + row * ld + column;
      switch (std::min<int64_t>(rows - row, 6)) {
        case 6: tile<6>(from, a.across, a.along, b.at, b.stride, depth, to, ld); break;
        case 5: tile<5>(from, a.across, a.along, b.at, b.stride, depth, to, ld); break;
        case 4: tile<4>(from, a.across, a.along, b.at, b.stride, depth, to, ld); break;
        case 3: tile<3>(from, a.across, a.along, b.at, b.stride, depth, to, ld); break;
        case 2: tile<2>(from, a.across, a.along, b.at, b.stride, depth, to, ld); break;
        default: tile<1>(from, a.across, a.along, b.at, b.stride, depth, to, ld);
      }
    }
}

}  // namespace
