// Softmax attention of documents that lie one after another, forward and back (FlashAttention-2, arXiv:2307.08691).
//
// All is computed in fp32, but where a processor multiplies bf16. Rows are queries by heads that share a key.

#include "attention.hpp"
#include "tiles.hpp"
#if defined(__AVX512BF16__)
#include "attention_bf16.hpp"
#endif

namespace {

constexpr int64_t ROWS = 48;  // queries by heads that look at keys together, or a few less or more

// Keys or values in fp32: as rows, and as panels of WIDE tokens each, turned so that a panel's row has one number of
// each token.
template <typename T>
struct Laid {
  Room<float> by_row, by_panel;

  Laid(const Panels& at, const void* from, bool turned) : by_row(at.a.kv_heads * at.tokens * at.a.size) {
    const Attention& a = at.a;
    const int64_t size = a.size;
    if (turned) by_panel.grow(a.kv_heads * at.tokens * size);
#pragma omp parallel for num_threads(a.threads) collapse(2) schedule(static)
    for (int64_t head = 0; head < a.kv_heads; head++)
      for (int64_t s = 0; s < a.documents; s++)
        for (int64_t i = 0; i < at.first[s + 1] - at.first[s]; i++) {
          const int64_t row = at.row(head, s, i), t = at.spans[s].start + i;
          const T* x = static_cast<const T*>(from) + (t * a.kv_heads + head) * size;
          const bool there = t < at.spans[s].stop;
          for (int64_t e = 0; e < size; e += LANES) store(by_row.at(row * size + e), there ? load(x + e) : floats{});
          if (!turned) continue;
          float* lane = by_panel.at(row / WIDE * WIDE * size + row % WIDE);
          for (int64_t e = 0; e < size; e++) lane[e * WIDE] = *by_row.at(row * size + e);
        }
  }
};

template <typename T>
struct Lanes : Sights<64> {
  static constexpr int64_t KEYS = 64;
  typedef T Number;

  struct Kept : Panels {
    const Laid<T> keys, values;
    Kept(const Attention& a, bool back) : Panels(a, WIDE), keys(*this, a.k, true), values(*this, a.v, back) {}

    Right rows(const Laid<T>& of, int64_t row) const { return {of.by_row.at(row * a.size), a.size, WIDE}; }
    Right columns(const Laid<T>& of, int64_t row) const {
      return {of.by_panel.at(row * a.size), WIDE, a.size * WIDE};
    }
  };

  const Kept& kept;
  std::vector<float> q, s, o, dout, ds, most, sum;

  Lanes(const Attention& a, const Kept& kept) : Sights(a), kept(kept) {
    const int64_t rows = tokens_at_once(a) * group;
    for (auto* room : {&q, &o, &dout}) room->resize(rows * size);
    for (auto* room : {&s, &ds}) room->resize(rows * KEYS);
    for (auto* room : {&most, &sum}) room->resize(rows);
  }

  static int64_t tokens_at_once(const Attention& a) { return std::max<int64_t>(ROWS * a.kv_heads / a.heads, 8); }

  // Calls of(number in a.heads, row in the block, token) for every row.
  template <typename Of>
  void each(const Block& b, Of of) const {
    for (int64_t t = b.from, row = 0; t < b.to; t++)
      for (int64_t g = 0; g < group; g++, row++) of(t * a.heads + b.head * group + g, row, t);
  }

  void take(const Block& b, const void* x, std::vector<float>& rows) const {
    each(b, [&](int64_t number, int64_t row, int64_t) {
      for (int64_t e = 0; e < size; e += LANES)
        store(&rows[row * size + e], load(static_cast<const T*>(x) + number * size + e));
    });
  }

  void give(const Block& b, const std::vector<float>& rows, void* x) const {
    each(b, [&](int64_t number, int64_t row, int64_t) {
      for (int64_t e = 0; e < size; e += LANES)
        store(static_cast<T*>(x) + number * size + e, load(&rows[row * size + e]));
    });
  }

  static int64_t columns(const Sight& k) { return (k.count + WIDE - 1) / WIDE * WIDE; }

  // Scores, or what goes back to shares: rows times turned keys, or values.
  void table(const std::vector<float>& rows, const Laid<T>& of, const Block& b, const Sight& k, std::vector<float>& to) {
    std::fill(to.begin(), to.end(), 0.f);
    product({rows.data(), size, 1}, kept.columns(of, kept.row(b.head, k.document, k.at)), (b.to - b.from) * group,
            columns(k), size, to.data(), KEYS);
  }

  void forward(const Block& b) {
    const int64_t rows = (b.to - b.from) * group;
    take(b, a.q, q);
    std::fill(o.begin(), o.end(), 0.f), std::fill(sum.begin(), sum.end(), 0.f);
    std::fill(most.begin(), most.end(), -INFINITY);
    over(b, [&](const Sight& k) {
      table(q, kept.keys, b, k, s);
      each(b, [&](int64_t, int64_t row, int64_t token) { share(b, k, row, token); });
      product({s.data(), KEYS, 1}, kept.rows(kept.values, kept.row(b.head, k.document, k.at)), rows, size, k.count,
              o.data(), size);
    });
    each(b, [&](int64_t number, int64_t row, int64_t) {
      for (int64_t e = 0; e < size; e += LANES) store(&o[row * size + e], load(&o[row * size + e]) / sum[row]);
      a.lse[number] = most[row] + std::log(sum[row]);
    });
    give(b, o, a.out);
  }

  // Scores of a row become exp(score - the largest so far); what was summed before is brought to the same measure.
  void share(const Block& b, const Sight& k, int64_t row, int64_t token) {
    int64_t low, high;
    seen(k, b, token, low, high);
    float* at = &s[row * KEYS];
    for (int64_t i = 0; i < columns(k); i += LANES) store(at + i, load(at + i) * a.scale);
    std::fill(at, at + low, -INFINITY), std::fill(at + high, at + columns(k), -INFINITY);
    floats largest_of = most[row] - floats{}, total_of{};
    for (int64_t i = 0; i < columns(k); i += LANES) largest_of = largest(largest_of, load(at + i));
    const float top = largest_of_all(largest_of);
    if (top > most[row]) {
      const float by = std::exp(most[row] - top);
      for (int64_t e = 0; e < size; e += LANES) store(&o[row * size + e], load(&o[row * size + e]) * by);
      sum[row] *= by, most[row] = top;
    }
    for (int64_t i = 0; i < columns(k); i += LANES) store(at + i, exponential(load(at + i) - top));
    std::fill(at, at + low, 0.f), std::fill(at + high, at + columns(k), 0.f);
    for (int64_t i = 0; i < columns(k); i += LANES) total_of += load(at + i);
    sum[row] += total(total_of);
  }

  // dV += P' dO; dS = scale * P (dO V' - sum(dO O)); dQ = dS K; dK += dS' Q.
  void back(const Block& b, float* dk, float* dv) {
    const int64_t rows = (b.to - b.from) * group;
    take(b, a.q, q), take(b, a.dout, dout), take(b, a.out, o);
    each(b, [&](int64_t, int64_t row, int64_t) {
      floats both{};
      for (int64_t e = 0; e < size; e += LANES)
        both = add_product(load(&o[row * size + e]), load(&dout[row * size + e]), both);
      sum[row] = total(both);
    });
    std::fill(o.begin(), o.end(), 0.f);  // from here on dQ
    over(b, [&](const Sight& k) {
      const int64_t at = kept.row(b.head, k.document, k.at);
      table(q, kept.keys, b, k, s), table(dout, kept.values, b, k, ds);
      each(b, [&](int64_t number, int64_t row, int64_t token) { shares_back(b, k, number, row, token); });
      product({s.data(), 1, KEYS}, {dout.data(), size, WIDE}, k.count, size, rows, dv + at * size, size);
      product({ds.data(), 1, KEYS}, {q.data(), size, WIDE}, k.count, size, rows, dk + at * size, size);
      product({ds.data(), KEYS, 1}, kept.rows(kept.keys, at), rows, size, k.count, o.data(), size);
    });
    give(b, o, a.dq);
  }

  void shares_back(const Block& b, const Sight& k, int64_t number, int64_t row, int64_t token) {
    int64_t low, high;
    seen(k, b, token, low, high);
    float *p = &s[row * KEYS], *back = &ds[row * KEYS];
    for (int64_t i = 0; i < columns(k); i += LANES) {
      const floats share = exponential(load(p + i) * a.scale - a.lse[number]);
      store(p + i, share), store(back + i, share * (load(back + i) - sum[row]) * a.scale);
    }
    for (float* each : {p, back}) std::fill(each, each + low, 0.f), std::fill(each + high, each + columns(k), 0.f);
  }
};

}  // namespace

#if defined(__AVX512BF16__)
typedef Tiled Narrow;
#else
typedef Lanes<uint16_t> Narrow;
#endif

extern "C" void FOR_THIS_SET(attend)(const Attention* a) {
  a->bf16 ? forward<Narrow>(*a) : forward<Lanes<float>>(*a);
}

extern "C" void FOR_THIS_SET(attend_back)(const Attention* a) {
  a->bf16 ? backward<Narrow>(*a) : backward<Lanes<float>>(*a);
}
