// Attention of bf16 by squares: scores lie with keys down and queries across, so that no table of shares is ever turned.
//
// A row is a query of one head; heads lie one after another, each with whole SIDEs of tokens, of which some may be
// none. Shares are rounded to bf16 before they are multiplied, as by other implementations; sums are fp32.

#pragma once

#include "bf16.hpp"
#include "attention.hpp"

namespace {

constexpr float LOG2_E = 1.44269504f;

struct Tiled : Sights<128> {
  static constexpr int64_t KEYS = 128;
  typedef uint16_t Number;

  // Keys and values of each head as rows, and in panels of SIDE tokens turned: of forward values, of back keys.
  struct Kept : Panels {
    Room<uint16_t> keys, values, panels;

    Kept(const Attention& a, bool back)
        : Panels(a, SIDE), keys(a.kv_heads * tokens * a.size), values(keys_count(back)), panels(keys_count(true)) {
#pragma omp parallel for num_threads(a.threads) collapse(2) schedule(static)
      for (int64_t head = 0; head < a.kv_heads; head++)
        for (int64_t s = 0; s < a.documents; s++) {
          Room<uint16_t> rows(SIDE * a.size);
          Room<uint32_t> pairs(SIDE / 2 * a.size);
          for (int64_t i = 0; i < first[s + 1] - first[s]; i += SIDE) {
            const int64_t at = row(head, s, i) * a.size;
            lay(a.k, head, s, i, keys.at(at));
            uint16_t* value_rows = back ? values.at(at) : rows.at();
            lay(a.v, head, s, i, value_rows);
            paired(back ? keys.at(at) : value_rows, SIDE, a.size, a.size, pairs.at(), a.size);
            turned(pairs.at(), SIDE / 2, a.size, a.size, panels.at(at), SIDE / 2);
          }
        }
    }
    int64_t keys_count(bool wanted) const { return wanted ? a.kv_heads * tokens * a.size : 0; }

    // SIDE tokens of a document as rows; behind its end they are zero.
    void lay(const void* from, int64_t head, int64_t document, int64_t i, uint16_t* to) const {
      for (int64_t t = spans[document].start + i, last = t + SIDE; t < last; t++, to += a.size)
        if (t < spans[document].stop)
          memcpy(to, static_cast<const uint16_t*>(from) + (t * a.kv_heads + head) * a.size, a.size * 2);
        else
          memset(to, 0, a.size * 2);
    }
  };

  // Queries, or what goes back to their outputs: turned, in words; and in pairs of rows.
  struct Asked {
    Room<uint16_t> rows;
    Room<uint32_t> turned, paired;
  };

  const Kept& kept;
  const Ready ready;
  int64_t wide = 0, each_head = 0;  // rows of the block, and of each of its heads
  Asked q, dout;
  Room<float> s, ds, sums, most, sum;
  Room<uint16_t> shares, shares_back;
  Room<uint32_t> pairs;

  Tiled(const Attention& a, const Kept& kept) : Sights(a), kept(kept) {
    const int64_t rows = whole(tokens_at_once(a)) * group;
    for (auto* each : {&q, &dout}) {
      each->rows.grow(rows * size);
      each->turned.grow(rows * size / 2), each->paired.grow(rows * size / 2);
    }
    for (auto* room : {&s, &ds}) room->grow(rows * std::max(KEYS, size));
    for (auto* room : {&shares, &shares_back}) room->grow(rows * KEYS);
    pairs.grow(rows * KEYS / 2), sums.grow(rows * size);
    for (auto* room : {&most, &sum}) room->grow(rows);
  }

  static int64_t tokens_at_once(const Attention& a) {
    return std::clamp<int64_t>(whole(192 * a.kv_heads / a.heads), SIDE, 128);
  }

  // Calls of(number in a.heads, row in the block) for every row that is a query.
  template <typename Of>
  void each(const Block& b, Of of) const {
    for (int64_t g = 0; g < group; g++)
      for (int64_t t = b.from; t < b.to; t++) of(t * a.heads + b.head * group + g, g * each_head + t - b.from);
  }

  void begin(const Block& b) { each_head = whole(b.to - b.from), wide = each_head * group; }

  void take(const Block& b, const void* x, const Room<uint16_t>& rows) const {
    for (int64_t g = 0, none = each_head - (b.to - b.from); none && g < group; g++)
      memset(rows.at(((g + 1) * each_head - none) * size), 0, none * size * 2);
    each(b, [&](int64_t number, int64_t row) {
      memcpy(rows.at(row * size), static_cast<const uint16_t*>(x) + number * size, size * 2);
    });
  }

  void take(const Block& b, const void* x, Asked& to, bool back) {
    take(b, x, to.rows);
    turned(to.rows.at(), wide, size / 2, size / 2, to.turned.at(), wide);
    if (back) paired(to.rows.at(), wide, size, size, to.paired.at(), size);
  }

  // The sums, which lie turned, as rows of x, each times what `by` says of it.
  template <typename By>
  void give(const Block& b, void* x, By by) {
    Room<float>& rows = s;
    turned(sums.at(), size, wide, wide, rows.at(), size);
    each(b, [&](int64_t number, int64_t row) {
      const float times = by(number, row);
      for (int64_t e = 0; e < size; e += LANES)
        store(static_cast<uint16_t*>(x) + number * size + e, load(rows.at(row * size + e)) * times);
    });
  }

  // A SIDE of rows, which are one head's: from which key on each sees the keys that are looked at, and up to which.
  struct Range {
    __m512i low[2], high[2];
    bool all;

    __mmask16 sees(int half, int64_t key) const {
      const __m512i at = _mm512_set1_epi32(key);
      return _mm512_cmpge_epi32_mask(at, low[half]) & _mm512_cmplt_epi32_mask(at, high[half]);
    }
    template <bool every>
    floats only(int half, int64_t key, floats x, float other) const {
      return every ? x : (floats)_mm512_mask_mov_ps(_mm512_set1_ps(other), sees(half, key), (__m512)x);
    }
  };

  Range range(const Block& b, const Sight& k, int64_t row) const {
    alignas(64) int32_t low[SIDE], high[SIDE];
    bool all = true;
    for (int64_t lane = 0; lane < SIDE; lane++) {
      const int64_t token = b.from + row % each_head + lane;
      int64_t from = 0, to = 0;
      if (token < b.to) seen(k, b, token, from, to);
      low[lane] = from, high[lane] = to;
      all = all && !from && to == whole(k.count);
    }
    return {{_mm512_load_si512(low), _mm512_load_si512(low + 16)}, {_mm512_load_si512(high), _mm512_load_si512(high + 16)}, all};
  }

  void forward(const Block& b) {
    begin(b);
    take(b, a.q, q, false);
    std::fill_n(sums.at(), wide * size, 0.f), std::fill_n(sum.at(), wide, 0.f), std::fill_n(most.at(), wide, -1e30f);
    over(b, [&](const Sight& k) {
      const int64_t at = kept.row(b.head, k.document, k.at) * size, count = whole(k.count);
      product<true>({kept.keys.at(at), size}, {q.turned.at(), wide}, count, wide, size, s.at(), wide);
      for (int64_t row = 0; row < wide; row += SIDE) {
        const Range sees = range(b, k, row);
        sees.all ? share<true>(sees, row, count) : share<false>(sees, row, count);
      }
      product<false>({kept.panels.at(at), SIDE, SIDE * size}, {pairs.at(), wide}, size, wide, count, sums.at(), wide);
    });
    each(b, [&](int64_t number, int64_t row) { a.lse[number] = *most.at(row) / LOG2_E + std::log(*sum.at(row)); });
    give(b, a.out, [&](int64_t, int64_t row) { return 1 / *sum.at(row); });
  }

  // Scores become shares, in pairs of keys: 2 ** (score - the largest so far); what was summed is brought to the same.
  template <bool every>
  void share(const Range& sees, int64_t row, int64_t count) {
    const float by = a.scale * LOG2_E;
    floats top[2], total[2];
    for (int half = 0; half < 2; half++) {
      const int64_t lane = row + half * LANES;
      const floats before = load(most.at(lane));
      top[half] = before;
      for (int64_t key = 0; key < count; key++)
        top[half] = largest(top[half], sees.only<every>(half, key, load(s.at(key * wide + lane)) * by, -1e30f));
      const floats less = power_of_two(before - top[half]);
      for (int64_t e = 0; e < size; e++) store(sums.at(e * wide + lane), load(sums.at(e * wide + lane)) * less);
      store(most.at(lane), top[half]), total[half] = load(sum.at(lane)) * less;
    }
    for (int64_t key = 0; key < count; key += 2) {
      __m512i two[2];
      for (int down = 0; down < 2; down++) {
        floats share[2];
        for (int half = 0; half < 2; half++) {
          const floats score = load(s.at((key + down) * wide + row + half * LANES));
          share[half] = sees.only<every>(half, key + down, power_of_two(add_product(score, by - floats{}, -top[half])), 0);
          total[half] += share[half];
        }
        two[down] = rounded(share[0], share[1]);
      }
      paired(two[0], two[1], pairs.at(key / 2 * wide + row));
    }
    for (int half = 0; half < 2; half++) store(sum.at(row + half * LANES), total[half]);
  }

  // dV += P' dO; dS = scale * P (dO V' - sum(dO O)); dQ = dS K; dK += dS' Q.
  void back(const Block& b, float* dk, float* dv) {
    begin(b);
    take(b, a.q, q, true), take(b, a.dout, dout, true);
    std::fill_n(sum.at(), wide, 0.f), std::fill_n(most.at(), wide, 0.f), std::fill_n(sums.at(), wide * size, 0.f);
    each(b, [&](int64_t number, int64_t row) {
      floats both{};
      const uint16_t* out = static_cast<const uint16_t*>(a.out) + number * size;
      for (int64_t e = 0; e < size; e += LANES) both = add_product(load(out + e), load(dout.rows.at(row * size + e)), both);
      *sum.at(row) = total(both), *most.at(row) = a.lse[number] * LOG2_E;
    });
    over(b, [&](const Sight& k) {
      const int64_t at = kept.row(b.head, k.document, k.at) * size, count = whole(k.count);
      product<true>({kept.keys.at(at), size}, {q.turned.at(), wide}, count, wide, size, s.at(), wide);
      product<true>({kept.values.at(at), size}, {dout.turned.at(), wide}, count, wide, size, ds.at(), wide);
      for (int64_t row = 0; row < wide; row += SIDE) {
        const Range sees = range(b, k, row);
        sees.all ? share_back<true>(sees, row, count) : share_back<false>(sees, row, count);
      }
      product<false>({shares.at(), wide}, {dout.paired.at(), size}, count, size, wide, dv + at, size);
      product<false>({shares_back.at(), wide}, {q.paired.at(), size}, count, size, wide, dk + at, size);
      product<false>({kept.panels.at(at), SIDE, SIDE * size}, {pairs.at(), wide}, size, wide, count, sums.at(), wide);
    });
    give(b, a.dq, [](int64_t, int64_t) { return 1.f; });
  }

  template <bool every>
  void share_back(const Range& sees, int64_t row, int64_t count) {
    const float by = a.scale * LOG2_E;
    floats lse[2], pull[2];
    for (int half = 0; half < 2; half++)
      lse[half] = load(most.at(row + half * LANES)), pull[half] = load(sum.at(row + half * LANES));
    for (int64_t key = 0; key < count; key += 2) {
      __m512i two[2];
      for (int down = 0; down < 2; down++) {
        const int64_t at = (key + down) * wide + row;
        floats share[2], back[2];
        for (int half = 0; half < 2; half++) {
          const floats score = load(s.at(at + half * LANES));
          share[half] = sees.only<every>(half, key + down, power_of_two(add_product(score, by - floats{}, -lse[half])), 0);
          const floats pulled = share[half] * (load(ds.at(at + half * LANES)) - pull[half]) * a.scale;
          back[half] = sees.only<every>(half, key + down, pulled, 0);
        }
        two[down] = rounded(back[0], back[1]);
        _mm512_storeu_si512(shares.at(at), rounded(share[0], share[1]));
        _mm512_storeu_si512(shares_back.at(at), two[down]);
      }
      paired(two[0], two[1], pairs.at(key / 2 * wide + row));
    }
  }
};

}  // namespace
