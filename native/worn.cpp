// What each row of a batch wears at one linear layer, added to y = W x + b: y += weight * (gain y + B (A x) + bias).
//
// An adapter is one piece of memory with a directory in front (deltaw/kernels/worn.py), read where it lies: rows of
// different adapters, of any rank, stand beside each other (S-LoRA, Sheng et al. 2023, arXiv:2311.03285; BGMV of Punica,
// Chen et al. 2023, arXiv:2310.18547).

#include <cstdint>
#include <cstring>

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
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * LANES <= count; i += 2 * LANES)
      sums[0] = (floats)_mm512_dpbf16_ps((__m512)sums[0], read<__m512bh>(a + i), read<__m512bh>(b + i));
#endif
  for (; i + 2 * LANES <= count; i += 2 * LANES)
    for (int j = 0; j < 2; j++) sums[j] = add_product(load(a + i + j * LANES), load(b + i + j * LANES), sums[j]);
  for (; i < count; i += LANES) sums[0] = add_product(load(a + i, count - i, 0), load(b + i, count - i, 0), sums[0]);
  return total(sums[0] + sums[1]);
}

// out += B' down, for `count` outputs.
template <typename T>
void expand(const float* down, const T* B, int64_t rank, int64_t count, float* out) {
  int64_t o = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    for (; o + SIDE <= count; o += SIDE) {
      const __m512i order[2] = {_mm512_load_si512(ORDER[0]), _mm512_load_si512(ORDER[1])};
      __m512 sums[2] = {(__m512)load(out + o), (__m512)load(out + o + LANES)};
      for (int64_t r = 0; r < rank; r += 2) {
        const __m512i first = read<__m512i>(B + r * count + o);
        const __m512i second = r + 1 < rank ? read<__m512i>(B + (r + 1) * count + o) : _mm512_setzero_si512();
        const __m128bh two = _mm_cvtneps_pbh(_mm_set_ps(0, 0, r + 1 < rank ? down[r + 1] : 0, down[r]));
        const __m512bh by = (__m512bh)_mm512_broadcastd_epi32((__m128i)two);
        for (int half = 0; half < 2; half++)
          sums[half] = _mm512_dpbf16_ps(sums[half], by, (__m512bh)_mm512_permutex2var_epi16(first, order[half], second));
      }
      store(out + o, (floats)sums[0]), store(out + o + LANES, (floats)sums[1]);
    }
#endif
  for (; o < count; o += LANES) {
    floats sum = load(out + o);
    for (int64_t r = 0; r < rank; r++) sum = add_product(down[r] - floats{}, load(B + r * count + o, count - o, 0), sum);
    store(out + o, sum);
  }
}

// One row: `down` and `out` are room for what is summed.
template <typename T>
void row(const Worn& w, const Group& g, const T* x, T* y, Room<float>& down, const Room<float>& out) {
  std::memset(out.at(), 0, sizeof(float) * w.outputs);
  for (int64_t i = g.first; i < g.last; i++) {
    const auto [adapter, weight] = w.each[i];
    const Place& at = part<Place>(adapter, 0)[w.layer];
    const T *A = part<T>(adapter, at.A), *gain = part<T>(adapter, at.gain), *bias = part<T>(adapter, at.bias);
    down.grow(at.rank);
    for (int64_t r = 0; r < at.rank; r++) *down.at(r) = weight * dot(A + r * w.inputs, x, w.inputs);
    expand(down.at(), part<T>(adapter, at.B), at.rank, w.outputs, out.at());
    if (!at.gain && !at.bias) continue;
    for (int64_t o = 0; o < w.outputs; o += LANES) {
      const int64_t left = w.outputs - o;
      floats more = at.bias ? load(bias + o, left, 0) : floats{};
      if (at.gain) more = add_product(load(gain + o, left, 0), load(y + o, left, 0), more);
      store(out.at(o), add_product(weight - floats{}, more, load(out.at(o))));
    }
  }
  for (int64_t o = 0; o < w.outputs; o += LANES)
    store(y + o, load(y + o, w.outputs - o, 0) + load(out.at(o)), w.outputs - o);
}

template <typename T>
void wear(const Worn& w) {
  int64_t rows = 0;
  for (int64_t g = 0; g < w.count; g++) rows += w.groups[g].stop - w.groups[g].start;
#pragma omp parallel num_threads(w.threads)
  {
    Room<float> down, out(w.outputs + LANES);
    int64_t g = 0, before = 0;  // rows of the groups before this one
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
      for (; i - before >= w.groups[g].stop - w.groups[g].start; g++) before += w.groups[g].stop - w.groups[g].start;
      const int64_t t = w.groups[g].start + i - before;
      row(w, w.groups[g], static_cast<const T*>(w.x) + t * w.x_across, static_cast<T*>(w.y) + t * w.y_across, down, out);
    }
  }
}

}  // namespace

extern "C" void FOR_THIS_SET(wear)(const Worn* w) { w->bf16 ? wear<uint16_t>(*w) : wear<float>(*w); }
