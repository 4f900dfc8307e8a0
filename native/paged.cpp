// Softmax attention over keys and values that lie in pages (PagedAttention, Kwon et al. 2023, arXiv:2309.06180).
//
// A page has SIDE tokens. Of each head its keys lie turned, and its values as they are, both in words of as many numbers
// as are multiplied at once: two of bf16, one of fp32. So keys and values are right factors as they lie.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "calls.hpp"
#include "room.hpp"
#include "words.hpp"

namespace {

struct Span {
  int64_t start, stop, past;
};

// Tokens of a sequence that are attended from together, from this one on, for one head of keys.
struct Unit {
  int64_t sequence, head, from;
};

// c = a b, or c += a b, for `high` rows of words. What lies at `next` as b does here comes next, and is asked for.
template <typename T, int high, bool onto>
void rows_by(const T* const* a, const T* b, const T* next, int64_t stride, int64_t depth, int64_t columns, float* c) {
  typedef typename Words<T>::word word;
  const word *right = reinterpret_cast<const word*>(b), *coming = reinterpret_cast<const word*>(next);
  for (int64_t column = 0; column < columns; column += 2 * LANES) {
    floats sums[high][2] = {};
    for (int i = 0; i < high && onto; i++)
      for (int j = 0; j < 2; j++) sums[i][j] = load(c + i * columns + column + j * LANES);
    const word* at = right + column;
    for (int64_t w = 0; w < depth / Words<T>::EACH; w++, at += stride) {
      const bits two[2] = {read<bits>(at), read<bits>(at + LANES)};
      if (next) __builtin_prefetch(coming + (at - right)), __builtin_prefetch(coming + (at - right) + LANES);
      for (int i = 0; i < high; i++) {
        const word left = read<word>(a[i] + w * Words<T>::EACH);
        for (int j = 0; j < 2; j++) sums[i][j] = Words<T>::add(sums[i][j], left, two[j]);
      }
    }
    for (int i = 0; i < high; i++)
      for (int j = 0; j < 2; j++) store(c + i * columns + column + j * LANES, sums[i][j]);
  }
}

// What shares are powers of: e, or with bf16 2, and by how much scores are larger then.
template <typename T>
constexpr float PER_UNIT = 1;
template <typename T>
floats power(floats x) {
  return exponential(x);
}
#if defined(__AVX512BF16__)
template <>
constexpr float PER_UNIT<uint16_t> = 1.44269504f;
template <>
floats power<uint16_t>(floats x) {
  return power_of_two(x);
}
#endif

constexpr int32_t PLACES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <typename T>
struct Worker {
  const Paged& p;
  const Span* spans;
  const int64_t group, tokens;  // heads that share keys, and tokens that are attended from together
  const float scale;
  Room<T> shares;
  Room<float> scores, sums, most, sum;  // `sum` has a row's sum in LANES parts

  explicit Worker(const Paged& p)
      : p(p), spans(reinterpret_cast<const Span*>(p.spans)), group(p.heads / p.kv_heads), tokens(at_once(p)), scale(p.scale * PER_UNIT<T>),
        shares(rows() * SIDE), scores(rows() * SIDE), sums(rows() * p.size), most(rows()), sum(rows() * LANES) {}

  static int64_t at_once(const Paged& p) { return std::max<int64_t>(1, SIDE * p.kv_heads / p.heads); }
  int64_t rows() const { return (tokens * group + SIDE - 1) / SIDE * SIDE; }

  T* keys(int64_t sequence, int64_t head, int64_t place) const {
    return static_cast<T*>(p.pages) + p.table[sequence * p.most + place / SIDE] * p.page + head * SIDE * p.size;
  }
  T* values(int64_t sequence, int64_t head, int64_t place) const { return keys(sequence, p.kv_heads + head, place); }

  // New keys and values of one head. What is behind a sequence's end is zero, as it is multiplied too.
  void keep(int64_t s, int64_t head) const {
    constexpr int64_t EACH = Words<T>::EACH;
    for (int64_t t = spans[s].start; t < spans[s].stop; t++) {
      const int64_t place = spans[s].past + t - spans[s].start, at = place % SIDE, from = (t * p.kv_heads + head) * p.size;
      T *key = keys(s, head, place), *value = values(s, head, place);
      if (!at) memset(value, 0, sizeof(T) * SIDE * p.size);
      for (int64_t e = 0; e < p.size; e++) {
        key[(e / EACH * SIDE + at) * EACH + e % EACH] = static_cast<const T*>(p.k)[from + e];
        value[(at / EACH * p.size + e) * EACH + at % EACH] = static_cast<const T*>(p.v)[from + e];
      }
    }
  }

  const T* query(int64_t head, int64_t token, int64_t row) const {
    return static_cast<const T*>(p.q) + ((token + row / group) * p.heads + head * group + row % group) * p.size;
  }

  // The place where the first page lies that the tokens of a unit see.
  int64_t begins(const Unit& u) const {
    const int64_t first = spans[u.sequence].past + u.from - spans[u.sequence].start;
    return p.window ? std::max<int64_t>(0, first + 1 - p.window) / SIDE * SIDE : 0;
  }

  // `after`: the unit that comes next, if there is one.
  void attend(const Unit& unit, const Unit* after) {
    const auto [s, head, from] = unit;
    const Span& span = spans[s];
    const int64_t count = (std::min(from + tokens, span.stop) - from) * group, first = span.past + from - span.start;
    std::fill_n(sums.at(), count * p.size, 0.f), std::fill_n(sum.at(), count * LANES, 0.f);
    std::fill_n(most.at(), count, -INFINITY);
    const int64_t last = first + (count - 1) / group;
    for (int64_t place = begins(unit); place <= last; place += SIDE) {
      const T *next_keys = nullptr, *next_values = nullptr;  // in a page that may lie anywhere
      if (place + SIDE <= last) next_keys = keys(s, head, place + SIDE), next_values = values(s, head, place + SIDE);
      else if (after)
        next_keys = keys(after->sequence, after->head, begins(*after)),
        next_values = values(after->sequence, after->head, begins(*after));
      each(count, [&](auto high, int64_t row) {
        const T *of[high], *next = row ? nullptr : next_keys;
        for (int i = 0; i < high; i++) of[i] = query(head, from, row + i);
        rows_by<T, high, false>(of, keys(s, head, place), next, SIDE, p.size, SIDE, scores.at(row * SIDE));
      });
      for (int64_t row = 0; row < count; row++) share(row, first + row / group - place);
      each(count, [&](auto high, int64_t row) {
        const T *of[high], *next = row ? nullptr : next_values;
        for (int i = 0; i < high; i++) of[i] = shares.at((row + i) * SIDE);
        rows_by<T, high, true>(of, values(s, head, place), next, p.size, SIDE, p.size, sums.at(row * p.size));
      });
    }
    for (int64_t row = 0; row < count; row++) {
      T* to = static_cast<T*>(p.out) + (query(head, from, row) - static_cast<const T*>(p.q));
      const float by = 1 / total(load(sum.at(row * LANES)));
      for (int64_t e = 0; e < p.size; e += LANES) store(to + e, load(sums.at(row * p.size + e)) * by);
    }
  }

  // Calls of(how many, the first row) for all rows.
  template <typename Of>
  static void each(int64_t count, Of of) {
    int64_t row = 0;
    for (; row + 8 <= count; row += 8) of(std::integral_constant<int, 8>(), row);
    if (count - row >= 4) of(std::integral_constant<int, 4>(), row), row += 4;
    if (count - row == 3) of(std::integral_constant<int, 3>(), row);
    if (count - row == 2) of(std::integral_constant<int, 2>(), row);
    if (count - row == 1) of(std::integral_constant<int, 1>(), row);
  }

  // Scores of a row become exp(score - the largest so far); what was summed before is brought to the same measure. The
  // row sees the keys up to number `own` of this page.
  void share(int64_t row, int64_t own) {
    constexpr int PARTS = SIDE / LANES;
    const int32_t high = std::clamp<int64_t>(own + 1, 0, SIDE);
    const int32_t low = p.window ? std::clamp<int64_t>(own + 1 - p.window, 0, high) : 0;
    if (low == high) {  // nothing of this page is seen
      std::fill_n(shares.at(row * SIDE), SIDE, T(0));
      return;
    }
    floats x[PARTS], top = -INFINITY + floats{};
    ints sees[PARTS];
    for (int i = 0; i < PARTS; i++) {
      const ints key = read<ints>(PLACES) + i * LANES;
      sees[i] = (key >= low) & (key < high);
      x[i] = sees[i] ? load(scores.at(row * SIDE + i * LANES)) * scale : -INFINITY + floats{};
      top = largest(top, x[i]);
    }
    const float before = *most.at(row), now = std::max(before, largest_of_all(top));
    floats all = load(sum.at(row * LANES));
    if (now > before) {
      const floats by = before > -INFINITY ? power<T>(before - now + floats{}) : floats{};
      for (int64_t e = 0; e < p.size; e += LANES) store(sums.at(row * p.size + e), load(sums.at(row * p.size + e)) * by);
      *most.at(row) = now, all *= by;
    }
    for (int i = 0; i < PARTS; i++) {
      x[i] = sees[i] ? power<T>(x[i] - now) : floats{};
      all += x[i], store(shares.at(row * SIDE + i * LANES), x[i]);
    }
    store(sum.at(row * LANES), all);
  }
};

template <typename T>
void paged(const Paged& p) {
  const Span* spans = reinterpret_cast<const Span*>(p.spans);
  std::vector<Unit> units;
  for (int64_t s = 0; s < p.sequences; s++)
    for (int64_t head = 0; head < p.kv_heads; head++)
      for (int64_t t = spans[s].start; t < spans[s].stop; t += Worker<T>::at_once(p)) units.push_back({s, head, t});
#pragma omp parallel num_threads(p.threads)
  {
    Worker<T> worker(p);
#pragma omp for schedule(static) collapse(2)
    for (int64_t s = 0; s < p.sequences; s++)
      for (int64_t head = 0; head < p.kv_heads; head++) worker.keep(s, head);
    const size_t some = std::min<size_t>(8, 1 + units.size() / (8 * p.threads));  // are taken at once
#pragma omp for schedule(dynamic, 1)
    for (size_t first = 0; first < units.size(); first += some)
      for (size_t i = first, end = std::min(units.size(), first + some); i < end; i++)
        worker.attend(units[i], i + 1 < end ? &units[i + 1] : nullptr);
  }
}

}  // namespace

extern "C" void FOR_THIS_SET(paged)(const Paged* p) { p->bf16 ? paged<uint16_t>(*p) : paged<float>(*p); }
