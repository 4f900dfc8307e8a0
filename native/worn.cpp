// What each row of a batch wears at one linear layer, added to y = W x + b: y += weight * (gain y + B (A x) + bias).
//
// An adapter is one piece of memory with a directory in front (deltaw/kernels/worn.py), read where it lies: rows of
// different adapters, of any rank, stand beside each other (S-LoRA, Sheng et al. 2023, arXiv:2311.03285; BGMV of Punica,
// Chen et al. 2023, arXiv:2310.18547).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "calls.hpp"
#include "room.hpp"
#include "words.hpp"

namespace {

template <typename T>
const T* part(const uint8_t* adapter, int64_t at) {
  return reinterpret_cast<const T*>(adapter + at);
}

template <typename T>
float dot(const T* a, const T* b, int64_t count) {
  floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES)
    for (int j = 0; j < 2; j++) sums[j] = add_product(load(a + i + j * LANES), load(b + i + j * LANES), sums[j]);
  for (; i < count; i += LANES) sums[0] = add_product(load(a + i, count - i, 0), load(b + i, count - i, 0), sums[0]);
  return total(sums[0] + sums[1]);
}

// Rows that wear the same, up to BLOCK at once: A and B are read once for them. `down` is what is between A and B, of
// each adapter in words of ranks, one for each row; ranks are even, as bfloat16 is multiplied in pairs of them.
constexpr int64_t BLOCK = 8;

inline int64_t even(int64_t rank) { return rank + rank % 2; }

template <int N, typename T>
int64_t lies(int64_t r, int64_t n) {
  constexpr int64_t EACH = Words<T>::EACH;
  return (r / EACH * N + n) * EACH + r % EACH;
}

// down = weight A x, of N rows.
template <int N, typename T>
void shrink(const T* A, const T* x, int64_t across, int64_t inputs, int64_t rank, float weight, float* down) {
  for (int64_t r = 0; r < even(rank); r++)
    for (int64_t n = 0; n < N; n++)
      down[lies<N, T>(r, n)] = r < rank ? weight * dot(A + r * inputs, x + n * across, inputs) : 0;
}

const Place& place(const Worn& w, int64_t i) { return part<Place>(w.each[i].adapter, 0)[w.layer]; }

// Whether adapters of a group have more at this layer than a low rank.
bool has_more(const Worn& w, const Group& g) {
  for (int64_t i = g.first; i < g.last; i++)
    if (place(w, i).gain || place(w, i).bias) return true;
  return false;
}

// What gain and bias of a group's adapters add to some numbers of y.
template <typename T>
floats beside(const Worn& w, const Group& g, int64_t o, floats y, floats sum) {
  for (int64_t i = g.first; i < g.last; i++) {
    const Place& at = place(w, i);
    const int64_t left = w.outputs - o;
    floats more = at.bias ? load(part<T>(w.each[i].adapter, at.bias) + o, left, 0) : floats{};
    if (at.gain) more = add_product(load(part<T>(w.each[i].adapter, at.gain) + o, left, 0), y, more);
    sum = add_product(w.each[i].weight - floats{}, more, sum);
  }
  return sum;
}

// What is between A and B, as it is multiplied with B: as it is, or narrowed in its place.
template <typename T>
const typename Words<T>::word* in_words(float* down, int64_t count) {
  if (Words<T>::EACH > 1)
    for (int64_t i = 0; i < count; i += LANES) store(reinterpret_cast<T*>(down) + i, load(down + i), count - i);
  return reinterpret_cast<typename Words<T>::word*>(down);
}

// y += B' down of all adapters of the group, and what is beside. B lies in panels of SIDE columns.
template <int N, typename T>
void expand(const Worn& w, const Group& g, float* down, int64_t ranks, T* y) {
  typedef typename Words<T>::word word;
  const word* words = in_words<T>(down, ranks * N);
  const bool more = has_more(w, g);
  for (int64_t o = 0; o < w.outputs; o += 2 * LANES) {
    floats sums[N][2] = {};
    const word* each = words;
    for (int64_t i = g.first; i < g.last; i++) {
      const Place& at = place(w, i);
      const int64_t deep = even(at.rank) / Words<T>::EACH;
      const word* B = part<word>(w.each[i].adapter, at.B) + o / SIDE * SIDE * deep + o % SIDE;
      for (const word* end = B + deep * SIDE; B < end; B += SIDE, each += N) {
        const bits left = read<bits>(B), right = read<bits>(B + LANES);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
          sums[n][0] = Words<T>::add(sums[n][0], each[n], left), sums[n][1] = Words<T>::add(sums[n][1], each[n], right);
      }
    }
    for (int n = 0; n < N; n++)
      for (int64_t half = 0, at = o; half < 2 && at < w.outputs; half++, at += LANES) {
        T* to = y + n * w.y_across + at;
        const floats before = load(to, w.outputs - at, 0);
        store(to, before + (more ? beside<T>(w, g, at, before, sums[n][half]) : sums[n][half]), w.outputs - at);
      }
  }
}

#if defined(__AVX512BF16__)
// Numbers of an adapter that are asked for before they are needed: what comes next lies behind.
constexpr int64_t AHEAD = 8192;

inline __m512bh some(const uint16_t* x, __mmask32 there) { return (__m512bh)_mm512_maskz_loadu_epi16(there, x); }

inline __m512bh streamed(const uint16_t* x, __mmask32 there) {
  _mm_prefetch(x + AHEAD, _MM_HINT_T0);
  return some(x, there);
}

// Sixteen sums at a time: of N rows, by 16 / N rows of A.
template <int N>
void shrink(const uint16_t* A, const uint16_t* x, int64_t across, int64_t inputs, int64_t rank, float weight, float* down) {
  constexpr int each = 16 / N;
  for (int64_t r = 0; r < even(rank); r += each) {
    __m512 sums[16] = {};
    const uint16_t* a[each];
    for (int j = 0; j < each; j++) a[j] = A + std::min(r + j, rank - 1) * inputs;
    for (int64_t k = 0; k < inputs; k += SIDE) {
      const __mmask32 there = inputs - k < SIDE ? ~0u >> (SIDE - (inputs - k)) : ~0u;
#pragma GCC unroll 16
      for (int j = 0; j < each; j++) {
        const __m512bh left = streamed(a[j] + k, there);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
          sums[n * each + j] = _mm512_dpbf16_ps(sums[n * each + j], left, some(x + n * across + k, there));
      }
    }
    float done[16];
    store(done, (weight - floats{}) * totals(sums));
    for (int j = 0; j < each && r + j < even(rank); j++)
      for (int n = 0; n < N; n++) down[lies<N, uint16_t>(r + j, n)] = r + j < rank ? done[n * each + j] : 0;
  }
}

#endif

// One half of it, with `h` in between: rows of ranks of all adapters of a group, one after another.
template <int N, typename T>
void half(const Worn& w, const Group& g, int64_t row, float* down, int64_t ranks) {
  const T* x = static_cast<const T*>(w.x) + row * w.x_across;
  float *h = w.down + row * w.down_across, *to = down;
  for (int64_t i = g.first; i < g.last; i++) {
    const auto [adapter, weight] = w.each[i];
    const Place& at = place(w, i);
    const int64_t first = w.x ? (at.rank * w.part + w.parts - 1) / w.parts : 0;
    const int64_t last = w.x ? (at.rank * (w.part + 1) + w.parts - 1) / w.parts : at.rank;
    if (w.x) shrink<N>(part<T>(adapter, at.A), x, w.x_across, w.inputs, last - first, weight, to);
    else std::fill(to, to + even(at.rank) * N, 0.f);
    for (int64_t n = 0; n < N; n++)
      for (int64_t r = first; r < last; r++) {
        float &wide = h[n * w.down_across + r], &close = to[lies<N, T>(r - first, n)];
        w.x ? wide = close : close = wide;
      }
    to += even(at.rank) * N, h += at.rank;
  }
  if (w.y) expand<N>(w, g, down, ranks, static_cast<T*>(w.y) + row * w.y_across);
}

template <int N, typename T>
void block(const Worn& w, const Group& g, int64_t row, Room<float>& down) {
  int64_t ranks = 0;
  for (int64_t i = g.first; i < g.last; i++) ranks += even(place(w, i).rank);
  down.grow(ranks * N);
  if (w.down) return half<N, T>(w, g, row, down.at(), ranks);
  const T* x = static_cast<const T*>(w.x) + row * w.x_across;
  float* to = down.at();
  for (int64_t i = g.first; i < g.last; i++) {
    const auto [adapter, weight] = w.each[i];
    const Place& at = place(w, i);
    shrink<N>(part<T>(adapter, at.A), x, w.x_across, w.inputs, at.rank, weight, to);
    to += even(at.rank) * N;
  }
  expand<N>(w, g, down.at(), ranks, static_cast<T*>(w.y) + row * w.y_across);
}

struct Some {
  const Group* group;
  int64_t row, count;
};

template <typename T>
void wear(const Worn& w) {
  int64_t rows = 0;
  for (int64_t g = 0; g < w.count; g++) rows += w.groups[g].stop - w.groups[g].start;
  const int64_t most = std::min(BLOCK, (rows + w.threads - 1) / w.threads);  // so that no thread is without any
  std::vector<Some> all;
  for (const Group* g = w.groups; g < w.groups + w.count; g++)
    for (int64_t row = g->start, count; row < g->stop; row += count) {
      for (count = BLOCK; count > std::min(most, g->stop - row); count /= 2) continue;
      all.push_back({g, row, count});
    }
#pragma omp parallel num_threads(w.threads)
  {
    static thread_local Room<float> down;
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < all.size(); i++) {
      const auto [group, row, count] = all[i];
      if (count == 8) block<8, T>(w, *group, row, down);
      else if (count == 4) block<4, T>(w, *group, row, down);
      else if (count == 2) block<2, T>(w, *group, row, down);
      else block<1, T>(w, *group, row, down);
    }
  }
}

}  // namespace

extern "C" void FOR_THIS_SET(wear)(const Worn* w) { w->bf16 ? wear<uint16_t>(*w) : wear<float>(*w); }
