// Sums of matrix products in bf16: c = a1 b1 + a2 b2 + ..., each b as it lies, or turned. Where a processor multiplies
// bf16.
//
// A frozen matrix, what adapters add to it, and neighbours that go back to one input are one sum: fp32 until its end,
// and c is written once. A thread takes some columns and rows, lays its columns of every b as tiles need them (at most
// DEPTH of it at a time, so that it stays in the cache), and runs through its rows. Few rows: few.hpp.

#if defined(__AVX512BF16__)

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bf16.hpp"
#include "few.hpp"
#include "room.hpp"

namespace {

// NEAR: numbers of a row of `a` that are used while they are in the nearest cache. DEPTH: of a column of `b` that are
// laid at once, and HELD words of all of them. ROWS_AT_ONCE: where it takes several times DEPTH.
constexpr int64_t NEAR = 640, DEPTH = 4096, HELD = 320 << 10, ROWS_AT_ONCE = 256;

struct Piece {
  const Part* part;
  int64_t from, depth;
};

// Pieces that are no more than NEAR together.
struct Stretch {
  std::vector<Piece> pieces;
  int64_t depth = 0;
};
typedef std::vector<Stretch> Run;  // stretches that are no more than DEPTH together

std::vector<Run> runs(const Sum& s) {
  std::vector<Run> all;
  int64_t room = 0;
  for (int64_t i = 0; i < s.count; i++)
    for (int64_t from = 0; from < s.parts[i].depth; from += NEAR) {
      const int64_t depth = std::min(NEAR, s.parts[i].depth - from);
      if (whole(depth) > room) all.emplace_back(), room = DEPTH;
      Run& run = all.back();
      if (run.empty() || run.back().depth + whole(depth) > NEAR) run.emplace_back();
      run.back().pieces.push_back({s.parts + i, from, depth});
      run.back().depth += whole(depth), room -= whole(depth);
    }
  return all;
}

int64_t depth_of(const Run& run) {
  int64_t depth = 0;
  for (const Stretch& each : run) depth += each.depth;
  return depth;
}

// Where a thread lays what it multiplies; it is kept from sum to sum, as fetching it anew takes longer than laying.
struct Desk {
  Room<uint32_t> laid;
  Room<uint16_t> edge, left{SIDE * NEAR};
  Room<float> sums;
};

// Some rows and columns of c.
struct Unit {
  const Sum& s;
  int64_t row, to_row, column, to_column;
  bool once;  // whether all depth is one run
  Desk& desk;

  // SIDE columns of a piece of b, as pairs of rows.
  void lay(const Piece& p, int64_t column, uint32_t* to) {
    const Part& part = *p.part;
    const int64_t wide = std::min(SIDE, s.columns - column), depth = whole(p.depth);
    if (part.turned) {
      const Rows b = padded(part.b + column * part.stride + p.from, part.stride, wide, p.depth, SIDE, desk.edge.at());
      return turned(b.at, SIDE, depth / 2, b.across / 2, to, SIDE);
    }
    const Rows b = padded(part.b + p.from * part.stride + column, part.stride, p.depth, wide, depth, desk.edge.at());
    paired(b.at, depth, SIDE, b.across, to, SIDE);
  }

  void run(const Run& stretches, bool first, bool last) {
    uint32_t* to = desk.laid.at();
    for (const Stretch& each : stretches)
      for (int64_t c = column; c < to_column; c += SIDE)
        for (const Piece& p : each.pieces) lay(p, c, to), to += whole(p.depth) / 2 * SIDE;
    const int64_t panels = (to_column - column + SIDE - 1) / SIDE;
    for (int64_t r = row; r < to_row; r += SIDE) {
      const uint32_t* right = desk.laid.at();
      float* sums = desk.sums.at(once ? 0 : (r - row) * panels * SIDE);
      for (const Stretch& each : stretches) {
        multiply(each, r, right, sums, first && &each == &stretches.front(), last && &each == &stretches.back());
        right += each.depth / 2 * SIDE * panels;
      }
    }
  }

  // SIDE rows from r on by all columns, as deep as a stretch; SIDE x SIDE of `sums` lie together.
  void multiply(const Stretch& stretch, int64_t r, const uint32_t* right, float* sums, bool first, bool last) {
    const int64_t high = std::min(SIDE, to_row - r);
    Rows a[NEAR / SIDE];
    uint16_t* left = desk.left.at();
    for (size_t i = 0; i < stretch.pieces.size(); i++) {
      const auto& [part, from, depth] = stretch.pieces[i];
      a[i] = padded(part->a + r * part->across + from, part->across, high, depth, SIDE, left);
      left += SIDE * whole(depth);
    }
    const int64_t apart = first && last ? 0 : SIDE * SIDE;  // what is given at once has one place, which stays near
    for (int64_t c = column; c < to_column; c += SIDE, sums += apart) {
      if (first && s.onto)
        over(r, high, c, sums, [&](uint16_t* from, float* to, int64_t left) { store(to, load(from, left, 0)); });
      Square square(sums, SIDE, first && !s.onto);
      for (size_t i = 0; i < stretch.pieces.size(); i++) {
        square.add(a[i], {right, SIDE}, stretch.pieces[i].depth);
        right += whole(stretch.pieces[i].depth) / 2 * SIDE;
      }
      square.done();
      if (last) give(r, high, c, sums);
    }
  }

  void give(int64_t row, int64_t high, int64_t column, float* sums) {
    if (s.columns - column < SIDE)
      return over(row, high, column, sums, [&](uint16_t* c, float* at, int64_t left) { store(c, load(at), left); });
    for (int64_t i = 0; i < high; i++) {
      const float* from = sums + i * SIDE;
      _mm512_storeu_si512(s.c + (row + i) * s.ld + column, rounded(load(from), load(from + LANES)));
    }
  }

  // Calls of(place in c, place in the sums, how many numbers there are) for pieces of rows.
  template <typename Of>
  void over(int64_t row, int64_t high, int64_t column, float* sums, Of of) {
    const int64_t wide = std::min(SIDE, s.columns - column);
    for (int64_t i = 0; i < high; i++)
      for (int64_t j = 0; j < wide; j += LANES)
        of(s.c + (row + i) * s.ld + column + j, sums + i * SIDE + j, wide - j);
  }
};

}  // namespace

extern "C" void FOR_THIS_SET(summed)(const Sum* given) {
  const Sum& s = *given;
  if (few(s)) return;
  const auto all = runs(s);
  int64_t deepest = SIDE;
  for (const Run& run : all) deepest = std::max(deepest, depth_of(run));
  const int64_t panels = (s.columns + SIDE - 1) / SIDE, most = std::max<int64_t>(1, HELD / (deepest / 2 * SIDE));
  int64_t groups = (panels + most - 1) / most;
  groups = std::min(panels, (groups + s.threads - 1) / s.threads * s.threads);
  const int64_t each = (panels + groups - 1) / groups, high = all.size() > 1 ? ROWS_AT_ONCE : whole(s.rows);
  const int64_t parts = std::max((s.rows + high - 1) / high, groups < 2 * s.threads ? 2 * s.threads / groups : 1);
  const int64_t tall = std::min(high, whole((s.rows + parts - 1) / parts));
#pragma omp parallel num_threads(s.threads)
  {
    static thread_local Desk desk;
    const Ready ready;
    desk.laid.grow(each * SIDE * deepest / 2), desk.edge.grow(SIDE * NEAR);
    desk.sums.grow(each * SIDE * (all.size() > 1 ? tall : SIDE));
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t column = 0; column < s.columns; column += each * SIDE)
      for (int64_t row = 0; row < s.rows; row += tall) {
        Unit unit{s, row, std::min(s.rows, row + tall), column, std::min(s.columns, column + each * SIDE),
                  all.size() == 1, desk};
        for (const Run& run : all) unit.run(run, &run == &all.front(), &run == &all.back());
      }
  }
}

// y = x W', without a list of parts: what is asked for most often.
extern "C" void FOR_THIS_SET(product)(const uint16_t* x, const uint16_t* w, uint16_t* y, int64_t rows, int64_t columns,
                                      int64_t depth, int64_t across, int64_t stride, int threads) {
  const Part part{x, w, across, stride, depth, 1};
  const Sum sum{&part, y, 1, rows, columns, columns, 0, threads};
  FOR_THIS_SET(summed)(&sum);
}

#endif
