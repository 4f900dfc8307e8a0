// Numbers into codes: which of the ascending levels is nearest to each.

#include <cstdint>
#include <cstring>

#include "lanes.hpp"

namespace {

// How many of the 2**width - 1 ascending edges lie below each number: a search by halves, all lanes at once.
template <int width>
inline bits below(const Table& edges, floats x) {
  ints found{};
  for (int step = 1 << (width - 1); step; step /= 2)
    found += (ints)(x > edges.at<width>((bits)found + uint32_t(step - 1))) & step;
  return (bits)found;
}

template <int width>
void search(const float* x, int64_t count, const float* edges, uint8_t* codes, int threads) {
  const Table table(edges, width < 8);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t left = count - i < LANES ? count - i : LANES;
    floats some{};
    memcpy(&some, x + i, sizeof(float) * left);
    const bytes found = __builtin_convertvector(below<width>(table, some), bytes);
    memcpy(codes + i, &found, left);
  }
}

}  // namespace

// Codes of `count` numbers. There are 2**width edges, of which the last is not asked; a number on one is below it.
extern "C" void FOR_THIS_SET(nearest)(const float* x, int64_t count, const float* edges, int width, uint8_t* codes,
                                      int threads) {
  switch (width) {
    case 2: return search<2>(x, count, edges, codes, threads);
    case 3: return search<3>(x, count, edges, codes, threads);
    case 4: return search<4>(x, count, edges, codes, threads);
    case 8: return search<8>(x, count, edges, codes, threads);
  }
}
