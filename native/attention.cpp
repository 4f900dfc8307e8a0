// Softmax attention of documents that lie one after another, forward and back (FlashAttention-2, arXiv:2307.08691).
//
// A document's tokens see those before them, the tokens of its stem if it has one, and no more than a window of all of
// these. Scores exist for a few queries and keys at a time. All is computed in fp32; rows are queries by heads that
// share a key.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tiles.hpp"

// As deltaw/kernels/attention.py lays it out.
struct Attention {
  const void *q, *k, *v;  // tokens x heads x size, tokens x kv_heads x size
  void* out;
  float* lse;  // tokens x heads: log sum exp of a query's scores
  const void* dout;
  void *dq, *dk, *dv;
  const int64_t* spans;  // of each document: start, stop, and start and stop of its stem
  int64_t documents, tokens, heads, kv_heads, size, window;
  float scale;
  int32_t bf16, threads;
};

namespace {

constexpr int64_t KEYS = 64;         // keys that are looked at together
constexpr int64_t ROWS = 48;         // rows that look at them, or a few less or more

struct Span {
  int64_t start, stop, stem, stem_stop;
};

// Keys or values of all tokens in fp32: as rows of one head after another, and as panels of WIDE tokens each, turned
// so that a panel's row has one number of each token. Every document begins a panel.
struct Kept {
  int64_t size, tokens, panels = 0;
  std::vector<int64_t> first;  // panel of each document
  std::vector<float> by_row, by_panel;

  template <typename T>
  Kept(const Attention& a, const T* x, bool turned) : size(a.size), tokens(a.tokens), by_row(a.kv_heads * tokens * size) {
    const Span* spans = reinterpret_cast<const Span*>(a.spans);
    for (int64_t s = 0; s < a.documents; s++) {
      first.push_back(panels);
      panels += (spans[s].stop - spans[s].start + WIDE - 1) / WIDE;
    }
    if (turned) by_panel.resize(a.kv_heads * panels * size * WIDE);
#pragma omp parallel for num_threads(a.threads) collapse(2) schedule(static)
    for (int64_t head = 0; head < a.kv_heads; head++)
      for (int64_t s = 0; s < a.documents; s++)
        for (int64_t t = spans[s].start; t < spans[s].stop; t++) {
          float* to = &by_row[(head * tokens + t) * size];
          for (int64_t e = 0; e < size; e += LANES) store(to + e, load(x + (t * a.kv_heads + head) * size + e));
          if (!turned) continue;
          const int64_t at = t - spans[s].start;
          float* lane = &by_panel[(head * panels + first[s] + at / WIDE) * size * WIDE + at % WIDE];
          for (int64_t e = 0; e < size; e++) lane[e * WIDE] = to[e];
        }
  }

  Right rows(int64_t head, int64_t token) const { return {&by_row[(head * tokens + token) * size], size, WIDE}; }
  Right columns(int64_t head, int64_t document, int64_t at) const {
    return {&by_panel[(head * panels + first[document] + at / WIDE) * size * WIDE], WIDE, size * WIDE};
  }
};

// Queries of a document, from one token to another, for one head of keys.
struct Block {
  int64_t document, head, from, to;
};

// Some keys that a block sees: `count` of them from token `at` on, whose place before the queries is `place`.
struct Sight {
  int64_t document, at, place, count;
};

struct Worker {
  const Attention& a;
  const Span* spans;
  int64_t group, size;
  std::vector<float> q, s, o, dout, ds, most, sum;

  explicit Worker(const Attention& a)
      : a(a), spans(reinterpret_cast<const Span*>(a.spans)), group(a.heads / a.kv_heads), size(a.size) {
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

  template <typename T>
  void take(const Block& b, const void* x, std::vector<float>& rows) const {
    each(b, [&](int64_t number, int64_t row, int64_t) {
      for (int64_t e = 0; e < size; e += LANES)
        store(&rows[row * size + e], load(static_cast<const T*>(x) + number * size + e));
    });
  }

  template <typename T>
  void give(const Block& b, const std::vector<float>& rows, void* x) const {
    each(b, [&](int64_t number, int64_t row, int64_t) {
      for (int64_t e = 0; e < size; e += LANES)
        store(static_cast<T*>(x) + number * size + e, load(&rows[row * size + e]));
    });
  }

  // Calls look(sight) for the keys of the stem and the document, as far as any query of the block sees them.
  template <typename Look>
  void over(const Block& b, Look look) const {
    const Span& own = spans[b.document];
    const int64_t stem = own.stem_stop - own.stem, last = stem + b.to - 1 - own.start;
    const int64_t least = a.window ? std::max<int64_t>(0, stem + b.from - own.start + 1 - a.window) : 0;
    int64_t of = b.document;
    while (stem && spans[of].start != own.stem) of--;
    for (int part = stem ? 0 : 1; part < 2; part++) {
      const int64_t place = part ? stem : 0, length = part ? own.stop - own.start : stem;
      for (int64_t at = 0; at < length && place + at <= last; at += KEYS) {
        const int64_t count = std::min({KEYS, length - at, last - place - at + 1});
        if (place + at + count > least) look({part ? b.document : of, at, place + at, count});
      }
    }
  }

  // Which of the keys that are looked at a query sees: from `low` up to `high`.
  void seen(const Sight& k, const Block& b, int64_t token, int64_t& low, int64_t& high) const {
    const Span& own = spans[b.document];
    const int64_t place = own.stem_stop - own.stem + token - own.start;
    high = std::clamp<int64_t>(place + 1 - k.place, 0, k.count);
    low = a.window ? std::clamp<int64_t>(place + 1 - a.window - k.place, 0, high) : 0;
  }

  static int64_t columns(const Sight& k) { return (k.count + WIDE - 1) / WIDE * WIDE; }

  // Scores, or what goes back to shares: rows times turned keys, or values.
  void table(const std::vector<float>& rows, const Kept& kept, const Block& b, const Sight& k, std::vector<float>& to) {
    std::fill(to.begin(), to.end(), 0.f);
    product({rows.data(), size, 1}, kept.columns(b.head, k.document, k.at), (b.to - b.from) * group, columns(k), size,
            to.data(), KEYS);
  }

  template <typename T>
  void forward(const Block& b, const Kept& keys, const Kept& values) {
    const int64_t rows = (b.to - b.from) * group;
    take<T>(b, a.q, q);
    std::fill(o.begin(), o.end(), 0.f), std::fill(sum.begin(), sum.end(), 0.f);
    std::fill(most.begin(), most.end(), -INFINITY);
    over(b, [&](const Sight& k) {
      table(q, keys, b, k, s);
      each(b, [&](int64_t, int64_t row, int64_t token) { share(b, k, row, token); });
      product({s.data(), KEYS, 1}, values.rows(b.head, spans[k.document].start + k.at), rows, size, k.count, o.data(),
              size);
    });
    each(b, [&](int64_t number, int64_t row, int64_t) {
      for (int64_t e = 0; e < size; e += LANES) store(&o[row * size + e], load(&o[row * size + e]) / sum[row]);
      a.lse[number] = most[row] + std::log(sum[row]);
    });
    give<T>(b, o, a.out);
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
  template <typename T>
  void back(const Block& b, const Kept& keys, const Kept& values, float* dk, float* dv) {
    const int64_t rows = (b.to - b.from) * group;
    take<T>(b, a.q, q), take<T>(b, a.dout, dout), take<T>(b, a.out, o);
    each(b, [&](int64_t, int64_t row, int64_t) {
      floats both{};
      for (int64_t e = 0; e < size; e += LANES)
        both = add_product(load(&o[row * size + e]), load(&dout[row * size + e]), both);
      sum[row] = total(both);
    });
    std::fill(o.begin(), o.end(), 0.f);  // from here on dQ
    over(b, [&](const Sight& k) {
      const int64_t at = (b.head * a.tokens + spans[k.document].start + k.at) * size;
      table(q, keys, b, k, s), table(dout, values, b, k, ds);
      each(b, [&](int64_t number, int64_t row, int64_t token) { shares_back(b, k, number, row, token); });
      product({s.data(), 1, KEYS}, {dout.data(), size, WIDE}, k.count, size, rows, dv + at, size);
      product({ds.data(), 1, KEYS}, {q.data(), size, WIDE}, k.count, size, rows, dk + at, size);
      product({ds.data(), KEYS, 1}, keys.rows(b.head, spans[k.document].start + k.at), rows, size, k.count, o.data(),
              size);
    });
    give<T>(b, o, a.dq);
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

template <typename T>
void forward(const Attention& a) {
  const Kept keys(a, static_cast<const T*>(a.k), true), values(a, static_cast<const T*>(a.v), false);
  const Span* spans = reinterpret_cast<const Span*>(a.spans);
  const int64_t step = Worker::tokens_at_once(a);
  std::vector<Block> blocks;
  for (int64_t s = 0; s < a.documents; s++)
    for (int64_t head = 0; head < a.kv_heads; head++)
      for (int64_t t = spans[s].start; t < spans[s].stop; t += step)
        blocks.push_back({s, head, t, std::min(t + step, spans[s].stop)});
#pragma omp parallel num_threads(a.threads)
  {
    Worker worker(a);
#pragma omp for schedule(dynamic, 4)
    for (size_t i = 0; i < blocks.size(); i++) worker.forward<T>(blocks[i], keys, values);
  }
}

// A stem and the documents that see it are one thread's work for one head of keys: nobody else adds to their dK and dV.
template <typename T>
void backward(const Attention& a) {
  const Kept keys(a, static_cast<const T*>(a.k), true), values(a, static_cast<const T*>(a.v), true);
  const Span* spans = reinterpret_cast<const Span*>(a.spans);
  std::vector<float> dk(a.kv_heads * a.tokens * a.size), dv(dk.size());
  std::vector<int64_t> families;
  for (int64_t s = 0; s < a.documents; s++)
    if (spans[s].stem == spans[s].stem_stop) families.push_back(s);
  families.push_back(a.documents);
  const int64_t step = Worker::tokens_at_once(a), units = (families.size() - 1) * a.kv_heads;
#pragma omp parallel num_threads(a.threads)
  {
    Worker worker(a);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; unit++) {
      const int64_t head = unit % a.kv_heads, family = unit / a.kv_heads;
      for (int64_t s = families[family]; s < families[family + 1]; s++)
        for (int64_t t = spans[s].start; t < spans[s].stop; t += step)
          worker.back<T>({s, head, t, std::min(t + step, spans[s].stop)}, keys, values, dk.data(), dv.data());
      for (int64_t t = spans[families[family]].start; t < spans[families[family + 1] - 1].stop; t++)
        for (int64_t e = 0; e < a.size; e += LANES) {
          const int64_t to = (t * a.kv_heads + head) * a.size + e, from = (head * a.tokens + t) * a.size + e;
          store(static_cast<T*>(a.dk) + to, load(&dk[from])), store(static_cast<T*>(a.dv) + to, load(&dv[from]));
        }
    }
  }
}

}  // namespace

extern "C" void FOR_THIS_SET(attend)(const Attention* a) { a->bf16 ? forward<uint16_t>(*a) : forward<float>(*a); }

extern "C" void FOR_THIS_SET(attend_back)(const Attention* a) { a->bf16 ? backward<uint16_t>(*a) : backward<float>(*a); }
