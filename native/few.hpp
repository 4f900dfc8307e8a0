// Sums of products for few rows: each b is columns x depth, read as it lies, once, and nothing of it is laid anew.
//
// Up to FEW rows a sum is a dot product along the depth, sixteen at a time. With more, columns of c are the rows of a
// square, as b lies as its left factor, and the rows of a, turned, are the right one; each square is turned back.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bf16.hpp"
#include "room.hpp"

// As deltaw/kernels/products.py lays it out.
struct Part {
  const uint16_t *a, *b;
  int64_t across, stride;  // from row to row, of a and of b
  int64_t depth, turned;   // b is depth x columns; turned, columns x depth
};
struct Sum {
  const Part* parts;
  uint16_t* c;
  int64_t count, rows, columns, ld;
  int32_t onto, threads;  // onto: c is added to
};

namespace {

// FEW: rows up to which a sum is a dot product. MANY: rows up to which b is not laid. AHEAD: numbers of b that are asked
// for before they are needed.
constexpr int64_t FEW = 8, MANY = 512, AHEAD = 8192;

// Rows and columns of a table in whole SIDEs, with zeros behind: where it lies, or copied to `room`.
Rows padded(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, int64_t all_rows, uint16_t* room) {
  if (rows == all_rows && columns % SIDE == 0 && stride % 2 == 0) return {x, stride};
  const int64_t wide = whole(columns);
  for (int64_t row = 0; row < all_rows; row++) {
    const int64_t there = row < rows ? columns : 0;
    memcpy(room + row * wide, x + row * stride, there * 2);
    memset(room + row * wide + there, 0, (wide - there) * 2);
  }
  return {room, wide};
}

// What a thread has of its own: a with zeros behind its rows and columns, turned or not, what is none in b, and sums.
struct Lot {
  Room<uint16_t> x, edge;
  Room<uint32_t> laid;
  Room<float> sums, square{SIDE * SIDE};
};

class Few {
  const Sum& s;
  Lot& lot;

 public:
  Few(const Sum& s, Lot& lot) : s(s), lot(lot) {
    int64_t all = 0, most = 0;
    for (int64_t i = 0; i < s.count; i++) all += whole(s.parts[i].depth), most = std::max(most, s.parts[i].depth);
    lot.x.grow((s.rows > FEW ? SIDE : FEW) * whole(s.rows > FEW ? most : all));
    lot.edge.grow(SIDE * whole(most)), lot.laid.grow(whole(s.rows) * all / 2), lot.sums.grow(whole(s.rows) * SIDE);
  }

  // A column of squares for each SIDE of columns.
  void squares(int64_t from, int64_t to) const {
    uint32_t* laid = lot.laid.at();
    for (int64_t i = 0; i < s.count; laid += whole(s.rows) * whole(s.parts[i++].depth) / 2)
      for (int64_t row = 0; row < s.rows; row += SIDE) lay(s.parts[i], row, laid + row * whole(s.parts[i].depth) / 2);
    const Ready ready;
    for (int64_t column = from; column < to; column += SIDE) {
      for (int64_t row = 0; row < s.rows; row += SIDE)
        if (s.rows - row > SIDE / 2) square<2>(column, row);
        else square<1>(column, row);
      give(column);
    }
  }

  template <int rows>
  void dots(int64_t from, int64_t to) const {
    uint16_t* x = lot.x.at();
    for (int64_t i = 0; i < s.count; x += rows * whole(s.parts[i++].depth)) {
      const Part& part = s.parts[i];
      const Rows a = padded(part.a, part.across, s.rows, part.depth, rows, x);
      if (a.at != x)
        for (int64_t row = 0; row < rows; row++) memcpy(x + row * part.depth, a.at + row * a.across, part.depth * 2);
    }
    for (int64_t column = from; column < to; column += SIDE) {
      for (int64_t first = 0; first < SIDE; first += 16 / rows) dot<rows>(column, first);
      give(column);
    }
  }

 private:
  int64_t high(int64_t row) const { return std::min(SIDE, s.rows - row); }
  int64_t wide(int64_t column) const { return std::min(SIDE, s.columns - column); }

  void lay(const Part& part, int64_t row, uint32_t* to) const {
    const int64_t all = high(row) > SIDE / 2 ? SIDE : SIDE / 2;
    const Rows a = padded(part.a + row * part.across, part.across, high(row), part.depth, all, lot.x.at());
    turned(a.at, all, whole(part.depth) / 2, a.across / 2, to, all);
  }

  template <int halves>
  void square(int64_t column, int64_t row) const {
    constexpr int64_t all = halves * SIDE / 2;
    Square square(lot.square.at(), SIDE, true);
    const uint32_t* laid = lot.laid.at();
    for (int64_t i = 0; i < s.count; laid += whole(s.rows) * whole(s.parts[i++].depth) / 2) {
      const Part& part = s.parts[i];
      const uint16_t* b = part.b + column * part.stride;
      const uint32_t* right = laid + row * whole(part.depth) / 2;
      const int64_t lies = wide(column) < SIDE ? 0 : part.depth / SIDE * SIDE, left = part.depth - lies;
      if (lies) square.add<halves>({b, part.stride, SIDE, row == 0}, {right, all}, lies);
      if (left)
        square.add<halves>(padded(b + lies, part.stride, wide(column), left, SIDE, lot.edge.at()),
                           {right + lies / 2 * all, all}, left);
    }
    square.done();
    turned(lot.square.at(), SIDE, all, SIDE, lot.sums.at(row * SIDE), SIDE);
  }

  template <int rows>
  void dot(int64_t column, int64_t first) const {
    constexpr int each = 16 / rows;
    __m512 sum[16] = {};
    const uint16_t *x = lot.x.at(), *b[each];
    for (int64_t i = 0; i < s.count; x += rows * whole(s.parts[i++].depth)) {
      const Part& part = s.parts[i];
      for (int j = 0; j < each; j++) b[j] = part.b + std::min(column + first + j, s.columns - 1) * part.stride;
      const int64_t lies = part.depth / SIDE * SIDE, left = part.depth - lies, deep = whole(part.depth);
      for (int64_t k = 0; k < lies; k += SIDE) step<rows>(sum, b, x + k, k, deep, ~0u);
      if (left) step<rows>(sum, b, x + lies, lies, deep, ~0u >> (SIDE - left));
    }
    float done[16];
    store(done, totals(sum));
    for (int row = 0; row < rows; row++) memcpy(lot.sums.at(row * SIDE + first), done + row * each, each * 4);
  }

  template <int rows>
  static inline void step(__m512 (&sum)[16], const uint16_t* (&b)[16 / rows], const uint16_t* x, int64_t k,
                          int64_t across, __mmask32 there) {
    constexpr int each = 16 / rows;
#pragma GCC unroll 16
    for (int j = 0; j < each; j++) {
      _mm_prefetch(b[j] + k + AHEAD, _MM_HINT_T0);
      const __m512bh right = (__m512bh)_mm512_maskz_loadu_epi16(there, b[j] + k);
#pragma GCC unroll 8
      for (int row = 0; row < rows; row++) {
        __m512& to = sum[row * each + j];
        to = _mm512_dpbf16_ps(to, right, read<__m512bh>(x + row * across));
      }
    }
  }

  void give(int64_t column) const {
    for (int64_t row = 0; row < s.rows; row++) {
      const float* from = lot.sums.at(row * SIDE);
      uint16_t* to = s.c + row * s.ld + column;
      if (wide(column) == SIDE && !s.onto)
        _mm512_storeu_si512(to, rounded(load(from), load(from + LANES)));
      else
        for (int64_t j = 0; j < wide(column); j += LANES) {
          const floats before = s.onto ? load(to + j, wide(column) - j, 0) : floats{};
          store(to + j, before + load(from + j), wide(column) - j);
        }
    }
  }
};

// Whether it was done: if there are few rows, and every b is columns x depth.
bool few(const Sum& s) {
  bool fits = s.rows <= MANY;
  for (int64_t i = 0; i < s.count; i++) fits &= s.parts[i].turned != 0;
  if (!fits) return false;
  const int64_t blocks = (s.columns + SIDE - 1) / SIDE, teams = std::min<int64_t>(s.threads, blocks);
#pragma omp parallel for num_threads(teams) schedule(static, 1)
  for (int64_t team = 0; team < teams; team++) {
    static thread_local Lot lot;
    const Few all(s, lot);
    const int64_t from = blocks * team / teams * SIDE, to = std::min(s.columns, blocks * (team + 1) / teams * SIDE);
    if (s.rows > FEW) all.squares(from, to);
    else if (s.rows > 4) all.dots<8>(from, to);
    else if (s.rows > 2) all.dots<4>(from, to);
    else if (s.rows > 1) all.dots<2>(from, to);
    else all.dots<1>(from, to);
  }
  return true;
}

}  // namespace
