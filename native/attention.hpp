// Who sees whom, in documents that lie one after another, and who computes what: for any way to multiply.
//
// A document's tokens see those before them, the tokens of its stem if it has one, and no more than a window of all of
// these. Scores exist for a few queries and keys at a time.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.hpp"
#include "room.hpp"

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

struct Span {
  int64_t start, stop, stem, stem_stop;
};

// Queries of a document, from one token to another, for one head of keys.
struct Block {
  int64_t document, head, from, to;
};

// Some keys that a block sees: `count` of them from token `at` on, whose place before the queries is `place`.
struct Sight {
  int64_t document, at, place, count;
};

// Where keys lie: one head after another, and in it every document in whole panels of as many as are multiplied at once.
struct Panels {
  const Attention& a;
  const Span* spans;
  int64_t tokens = 0;
  std::vector<int64_t> first;  // of each document, and where there are no more

  Panels(const Attention& a, int64_t width) : a(a), spans(reinterpret_cast<const Span*>(a.spans)) {
    for (int64_t s = 0; s < a.documents; s++) {
      first.push_back(tokens);
      tokens += (spans[s].stop - spans[s].start + width - 1) / width * width;
    }
    first.push_back(tokens);
  }
  int64_t row(int64_t head, int64_t document, int64_t at) const { return head * tokens + first[document] + at; }
};

// What the queries of a block see: KEYS keys at a time.
template <int64_t KEYS>
struct Sights {
  const Attention& a;
  const Span* spans;
  const int64_t group, size;

  explicit Sights(const Attention& a)
      : a(a), spans(reinterpret_cast<const Span*>(a.spans)), group(a.heads / a.kv_heads), size(a.size) {}

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
};

template <typename Worker>
void forward(const Attention& a) {
  const typename Worker::Kept kept(a, false);
  const int64_t step = Worker::tokens_at_once(a);
  std::vector<Block> blocks;
  for (int64_t s = 0; s < a.documents; s++)
    for (int64_t head = 0; head < a.kv_heads; head++)
      for (int64_t t = kept.spans[s].start; t < kept.spans[s].stop; t += step)
        blocks.push_back({s, head, t, std::min(t + step, kept.spans[s].stop)});
#pragma omp parallel num_threads(a.threads)
  {
    Worker worker(a, kept);
#pragma omp for schedule(dynamic, 4)
    for (size_t i = 0; i < blocks.size(); i++) worker.forward(blocks[i]);
  }
}

// A stem and the documents that see it are one thread's work for one head of keys: nobody else adds to their dK and dV.
// Where these are too few for all threads, they are parts of it, with sums of their own.
template <typename Worker>
void backward(const Attention& a) {
  const typename Worker::Kept kept(a, true);
  const Span* spans = kept.spans;
  std::vector<int64_t> families;
  for (int64_t s = 0; s < a.documents; s++)
    if (spans[s].stem == spans[s].stem_stop) families.push_back(s);
  families.push_back(a.documents);
  const int64_t alone = (families.size() - 1) * a.kv_heads;
  const int64_t parts = std::min<int64_t>(a.threads, (4 * a.threads + alone - 1) / alone);  // each takes memory
  const int64_t step = Worker::tokens_at_once(a), all = a.kv_heads * kept.tokens * a.size;
  const Room<float> dk(parts * all), dv(parts * all);
#pragma omp parallel num_threads(a.threads)
  {
    Worker worker(a, kept);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < alone * parts; unit++) {
      const int64_t part = unit % parts, head = unit / parts % a.kv_heads, family = unit / parts / a.kv_heads;
      const int64_t first = families[family], next = families[family + 1];
      const int64_t begin = part * all + kept.row(head, first, 0) * a.size;
      const int64_t end = part * all + kept.row(head, next, 0) * a.size;
      std::fill(dk.at(begin), dk.at(end), 0.f), std::fill(dv.at(begin), dv.at(end), 0.f);
      int64_t block = 0;
      for (int64_t s = first; s < next; s++)
        for (int64_t t = spans[s].start; t < spans[s].stop; t += step)
          if (block++ % parts == part)
            worker.back({s, head, t, std::min(t + step, spans[s].stop)}, dk.at(part * all), dv.at(part * all));
    }
#pragma omp for schedule(static) collapse(2)
    for (int64_t s = 0; s < a.documents; s++)
      for (int64_t head = 0; head < a.kv_heads; head++)
        for (int64_t t = spans[s].start; t < spans[s].stop; t++)
          for (int64_t e = 0; e < a.size; e += LANES) {
            const int64_t to = (t * a.kv_heads + head) * a.size + e;
            const int64_t from = kept.row(head, s, t - spans[s].start) * a.size + e;
            floats key{}, value{};
            for (int64_t part = 0; part < parts; part++)
              key += load(dk.at(part * all + from)), value += load(dv.at(part * all + from));
            store(static_cast<typename Worker::Number*>(a.dk) + to, key);
            store(static_cast<typename Worker::Number*>(a.dv) + to, value);
          }
  }
}

}  // namespace
