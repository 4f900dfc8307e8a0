// What each row of a batch wears at one linear layer, added to y = W x + b: y += weight * (gain y + B (A x) + bias).
//
// An adapter is one piece of memory with a directory in front (deltaw/kernels/worn.py), read where it lies: rows of
// different adapters, of any rank, stand beside each other (S-LoRA, Sheng et al. 2023, arXiv:2311.03285; BGMV of Punica,
// Chen et al. 2023, arXiv:2310.18547).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.hpp"
#include "room.hpp"
#if defined(__AVX512BF16__)
#include "bf16.hpp"
#endif

// Of one layer: how many bytes from the beginning each part lies, 0 where there is none. A is rank x inputs, B, with its
// scale, rank x outputs.
struct Place {
  int64_t rank, A, B, gain, bias;
};
struct Each {
  const uint8_t* adapter;
  float weight;
};
// Rows that wear the same: those of `each` from `first` up to `last`.
struct Group {
  int64_t start, stop, first, last;
};
struct Worn {
  const void* x;
  void* y;
  const Group* groups;
  const Each* each;
  int64_t count, layer, inputs, outputs, x_across, y_across;
  int32_t bf16, threads;
};

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
// each adapter, rank and row; ranks are even, as bfloat16 is multiplied in pairs of them.
constexpr int64_t BLOCK = 8;

inline int64_t even(int64_t rank) { return rank + rank % 2; }

// down = weight A x, of N rows.
template <int N, typename T>
void shrink(const T* A, const T* x, int64_t across, int64_t inputs, int64_t rank, float weight, float* down) {
  for (int64_t r = 0; r < even(rank); r++)
    for (int64_t n = 0; n < N; n++)
      down[r * N + n] = r < rank ? weight * dot(A + r * inputs, x + n * across, inputs) : 0;
}

// What gain and bias of a group's adapters add to some numbers of y.
template <typename T>
floats beside(const Worn& w, const Group& g, int64_t o, floats y, floats sum) {
  for (int64_t i = g.first; i < g.last; i++) {
    const Place& at = part<Place>(w.each[i].adapter, 0)[w.layer];
    const int64_t left = w.outputs - o;
    floats more = at.bias ? load(part<T>(w.each[i].adapter, at.bias) + o, left, 0) : floats{};
    if (at.gain) more = add_product(load(part<T>(w.each[i].adapter, at.gain) + o, left, 0), y, more);
    sum = add_product(w.each[i].weight - floats{}, more, sum);
  }
  return sum;
}

template <typename T>
void give(const Worn& w, const Group& g, int64_t o, T* y, floats sum) {
  const floats before = load(y, w.outputs - o, 0);
  store(y, before + beside<T>(w, g, o, before, sum), w.outputs - o);
}

// y += B' down of all adapters of the group, and what is beside.
template <int N, typename T>
void expand(const Worn& w, const Group& g, const float* down, T* y) {
  for (int64_t o = 0; o < w.outputs; o += LANES) {
    floats sums[N] = {};
    const float* each = down;
    for (int64_t i = g.first; i < g.last; i++) {
      const Place& at = part<Place>(w.each[i].adapter, 0)[w.layer];
      const T* B = part<T>(w.each[i].adapter, at.B);
      for (int64_t r = 0; r < at.rank; r++) {
        const floats b = load(B + r * w.outputs + o, w.outputs - o, 0);
        for (int n = 0; n < N; n++) sums[n] = add_product(each[r * N + n] - floats{}, b, sums[n]);
      }
      each += even(at.rank) * N;
    }
    for (int n = 0; n < N; n++) give(w, g, o, y + n * w.y_across + o, sums[n]);
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
      for (int n = 0; n < N; n++) down[(r + j) * N + n] = r + j < rank ? done[n * each + j] : 0;
  }
}

template <int N>
void expand(const Worn& w, const Group& g, float* down, uint16_t* y) {
  uint32_t* words = reinterpret_cast<uint32_t*>(down);  // in place: pairs of ranks become a word
  for (int64_t i = g.first, at = 0, to = 0; i < g.last; i++)
    for (int64_t r = even(part<Place>(w.each[i].adapter, 0)[w.layer].rank); r; r -= 2, at += 2 * N)
      for (int n = 0; n < N; n++, to++) {
        const __m128bh two = _mm_cvtneps_pbh(_mm_set_ps(0, 0, down[at + N + n], down[at + n]));
        words[to] = (uint32_t)_mm_cvtsi128_si32((__m128i)two);
      }
  const __m512i order[2] = {_mm512_load_si512(ORDER[0]), _mm512_load_si512(ORDER[1])};
  for (int64_t o = 0; o < w.outputs; o += SIDE) {
    const __mmask32 there = w.outputs - o < SIDE ? ~0u >> (SIDE - (w.outputs - o)) : ~0u;
    __m512 sums[N][2] = {};
    const uint32_t* word = words;
    for (int64_t i = g.first; i < g.last; i++) {
      const Place& at = part<Place>(w.each[i].adapter, 0)[w.layer];
      const uint16_t* B = part<uint16_t>(w.each[i].adapter, at.B) + o;
      for (int64_t r = 0; r < at.rank; r += 2, word += N) {
        const __m512i first = (__m512i)streamed(B + r * w.outputs, there);
        const __m512i second = r + 1 < at.rank ? (__m512i)streamed(B + (r + 1) * w.outputs, there) : __m512i{};
        const __m512bh low = (__m512bh)_mm512_permutex2var_epi16(first, order[0], second);
        const __m512bh high = (__m512bh)_mm512_permutex2var_epi16(first, order[1], second);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
          const __m512bh by = (__m512bh)_mm512_set1_epi32((int)word[n]);
          sums[n][0] = _mm512_dpbf16_ps(sums[n][0], by, low), sums[n][1] = _mm512_dpbf16_ps(sums[n][1], by, high);
        }
      }
    }
    for (int n = 0; n < N; n++)
      for (int half = 0; half < 2 && o + half * LANES < w.outputs; half++)
        give(w, g, o + half * LANES, y + n * w.y_across + o + half * LANES, (floats)sums[n][half]);
  }
}
#endif

template <int N, typename T>
void block(const Worn& w, const Group& g, const T* x, T* y, Room<float>& down) {
  int64_t ranks = 0;
  for (int64_t i = g.first; i < g.last; i++) ranks += even(part<Place>(w.each[i].adapter, 0)[w.layer].rank);
  down.grow(ranks * N);
  float* to = down.at();
  for (int64_t i = g.first; i < g.last; i++) {
    const auto [adapter, weight] = w.each[i];
    const Place& at = part<Place>(adapter, 0)[w.layer];
    shrink<N>(part<T>(adapter, at.A), x, w.x_across, w.inputs, at.rank, weight, to);
    to += even(at.rank) * N;
  }
  expand<N>(w, g, down.at(), y);
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
      const T* x = static_cast<const T*>(w.x) + row * w.x_across;
      T* y = static_cast<T*>(w.y) + row * w.y_across;
      if (count == 8) block<8>(w, *group, x, y, down);
      else if (count == 4) block<4>(w, *group, x, y, down);
      else if (count == 2) block<2>(w, *group, x, y, down);
      else block<1>(w, *group, x, y, down);
    }
  }
}

}  // namespace

extern "C" void FOR_THIS_SET(wear)(const Worn* w) { w->bf16 ? wear<uint16_t>(*w) : wear<float>(*w); }
