// What is done to each token by itself: norms, gates, turns by its position, and the surprise at what follows.
//
// Numbers are stored as fp32 or bf16, and computed with in fp32. Widths are whole numbers of 16, but for logits.

#include <cmath>
#include <cstdint>

#include "lanes.hpp"
#if defined(__AVX512BF16__)
#include "bf16.hpp"
#endif

namespace {

constexpr int64_t FEW = 1 << 14;  // numbers that one thread is done with before another has begun

// y = x / rms(x) * gain; what 1 / rms(x) was is written too.
template <typename T>
void norm(const T* x, const T* gain, T* y, float* inverse, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * width;
    floats squares{};
    for (int64_t i = 0; i < width; i += LANES) squares = add_product(load(from + i), load(from + i), squares);
    const float by = inverse[row] = 1 / std::sqrt(total(squares) / width + eps);
    for (int64_t i = 0; i < width; i += LANES) store(y + row * width + i, load(from + i) * by * load(gain + i));
  }
}

// dx = by * g - x * by^3 * mean(g x), with g = gain dy and by = 1 / rms(x).
template <typename T>
void norm_back(const T* x, const T* gain, const float* inverse, const T* dy, T* dx, int64_t rows, int64_t width,
               int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t at = row * width;
    floats products{};
    for (int64_t i = 0; i < width; i += LANES)
      products = add_product(load(dy + at + i) * load(gain + i), load(x + at + i), products);
    const float by = inverse[row], pull = by * by * by * total(products) / width;
    for (int64_t i = 0; i < width; i += LANES)
      store(dx + at + i, load(dy + at + i) * load(gain + i) * by - load(x + at + i) * pull);
  }
}

// s = 1 / (1 + exp(-k(g))): SiLU is g s with k(g) = g, and GELU by tanh with a cubic k. Returns s and g s' / s.
constexpr float CUBIC = 0.044715f, TWICE = 1.5957691216f;  // 2 sqrt(2 / pi)

inline floats logistic(floats k, float) { return 1 / (1 + exponential(-k)); }

#if defined(__AVX512BF16__)
// Within 7e-5 of itself: far nearer than bf16 tells apart.
inline floats logistic(floats k, uint16_t) {
  const floats power = -1.44269504f * k, most = 126 + floats{};
  return (floats)_mm512_rcp14_ps((__m512)(1 + power_of_two(power > most ? most : power)));
}
#else
inline floats logistic(floats k, uint16_t) { return logistic(k, 0.f); }
#endif

template <bool gelu, typename T>
inline floats gate(floats g, floats& slope) {
  const floats k = gelu ? TWICE * (g + CUBIC * g * g * g) : g;
  const floats s = logistic(k, T());
  slope = (1 - s) * g * (gelu ? TWICE * (1 + 3 * CUBIC * g * g) : 1 + floats{});
  return s;
}

// y = act(g) u.
template <bool gelu, typename T>
void gated(const T* g, const T* u, T* y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > FEW)
  for (int64_t i = 0; i < count; i += LANES) {
    floats slope;
    const floats x = load(g + i);
    store(y + i, x * gate<gelu, T>(x, slope) * load(u + i));
  }
}

// du = act(g) dy, dg = act'(g) u dy.
template <bool gelu, typename T>
void gated_back(const T* g, const T* u, const T* dy, T* dg, T* du, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > FEW)
  for (int64_t i = 0; i < count; i += LANES) {
    floats slope;
    const floats x = load(g + i), back = load(dy + i), s = gate<gelu, T>(x, slope);
    store(du + i, x * s * back);
    store(dg + i, (s + s * slope) * load(u + i) * back);
  }
}

// Pairs (x[e], x[e + width / 2]) of every head are turned by their token's angle, or back; the rest of a head stays.
template <typename T>
void turn(const T* x, int64_t stride, const T* cosine, const T* sine, T* y, int64_t tokens, int64_t heads, int64_t size,
          int64_t width, float way, int threads) {
  const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * heads * size > FEW)
  for (int64_t token = 0; token < tokens; token++)
    for (int64_t head = 0; head < heads; head++) {
      const T* from = x + token * stride + head * size;
      T* to = y + (token * heads + head) * size;
      for (int64_t i = 0; i < half; i += LANES) {
        const floats c = load(cosine + token * width + i), s = load(sine + token * width + i) * way;
        const floats a = load(from + i), b = load(from + half + i);
        store(to + i, a * c - b * s);
        store(to + half + i, b * c + a * s);
      }
      for (int64_t i = width; i < size; i += LANES) store(to + i, load(from + i));
    }
}

// Of every row of logits z: log sum exp(z) - z[label]; and if asked, softmax(z) - onehot(label) in the place of z.
template <typename T>
void surprise(T* z, const int64_t* labels, float* loss, int64_t rows, int64_t width, bool back, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    T* at = z + row * width;
    floats most = -INFINITY + floats{}, sum{};
    for (int64_t i = 0; i < width; i += LANES) most = largest(most, load(at + i, width - i, -INFINITY));
    const float top = largest_of_all(most);
    for (int64_t i = 0; i < width; i += LANES) sum += exponential(load(at + i, width - i, -INFINITY) - top);
    const int64_t label = labels[row], among = label / LANES * LANES;
    const float lse = top + std::log(total(sum));
    loss[row] = lse - load(at + among, width - among, 0)[label - among];
    for (int64_t i = 0; back && i < width; i += LANES) {
      floats share = exponential(load(at + i, width - i, 0) - lse);
      if (i == among) share[label - among] -= 1;
      store(at + i, share, width - i);
    }
  }
}

}  // namespace

#define TYPED(call) \
  if (bf16) {       \
    using T = uint16_t; \
    call;           \
  } else {          \
    using T = float; \
    call;           \
  }
#define IN(x) static_cast<const T*>(x)
#define OUT(x) static_cast<T*>(x)

extern "C" {

void FOR_THIS_SET(norm)(const void* x, const void* gain, void* y, float* inverse, int64_t rows, int64_t width,
                        float eps, int bf16, int threads) {
  TYPED(norm(IN(x), IN(gain), OUT(y), inverse, rows, width, eps, threads))
}

void FOR_THIS_SET(norm_back)(const void* x, const void* gain, const float* inverse, const void* dy, void* dx,
                             int64_t rows, int64_t width, int bf16, int threads) {
  TYPED(norm_back(IN(x), IN(gain), inverse, IN(dy), OUT(dx), rows, width, threads))
}

void FOR_THIS_SET(gated)(const void* g, const void* u, void* y, int64_t count, int gelu, int bf16, int threads) {
  TYPED(gelu ? gated<true>(IN(g), IN(u), OUT(y), count, threads) : gated<false>(IN(g), IN(u), OUT(y), count, threads))
}

void FOR_THIS_SET(gated_back)(const void* g, const void* u, const void* dy, void* dg, void* du, int64_t count, int gelu,
                              int bf16, int threads) {
  TYPED(gelu ? gated_back<true>(IN(g), IN(u), IN(dy), OUT(dg), OUT(du), count, threads)
             : gated_back<false>(IN(g), IN(u), IN(dy), OUT(dg), OUT(du), count, threads))
}

void FOR_THIS_SET(turn)(const void* x, int64_t stride, const void* cosine, const void* sine, void* y, int64_t tokens,
                        int64_t heads, int64_t size, int64_t width, float way, int bf16, int threads) {
  TYPED(turn(IN(x), stride, IN(cosine), IN(sine), OUT(y), tokens, heads, size, width, way, threads))
}

void FOR_THIS_SET(surprise)(void* z, const int64_t* labels, float* loss, int64_t rows, int64_t width, int back,
                            int bf16, int threads) {
  TYPED(surprise(OUT(z), labels, loss, rows, width, back, threads))
}
}
