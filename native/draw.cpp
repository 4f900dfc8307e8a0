// Draws one token of each row of logits: by one number in [0, 1), from what temperature, top-k, top-p and min-p leave.
//
// Each of them is a cut in the order of logits, of equals the lower id first: nothing is sorted but what is near it.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.hpp"
#include "room.hpp"

namespace {

constexpr int64_t BLOCK = 256;  // tokens whose shares are summed in fp32; sums of blocks are added in fp64
constexpr int64_t FEW = 256;    // tokens that are sorted rather than halved once more
constexpr float GONE = -87;     // e to it is the least that `exponential` knows, and nothing beside 1

struct Row {
  const void* logits;
  int64_t bf16, top_k;
  double temperature, top_p, min_p, number;  // temperature 0: the likeliest
  int64_t token;
};

struct Token {
  float logit;
  int64_t id;
  bool operator<(const Token& b) const { return logit != b.logit ? logit > b.logit : id < b.id; }
};

struct Above {
  int64_t count = 0;
  double share = 0;
};

template <typename T>
struct Drawing {
  const T* z;
  const int64_t width;
  float* shares;  // of each token, over that of the likeliest
  double* sums;   // of the shares of each block, as they were told last
  Token top{-INFINITY, -1};

  // The sum of shares, as they are told by where logits stand and what they are.
  template <typename F>
  inline double summed(F told) const {
    double all = 0;
    for (int64_t start = 0; start < width; start += BLOCK) {
      floats sum{};
      const int64_t stop = std::min(width, start + BLOCK);
      for (int64_t i = start; i < stop; i += LANES) sum += told(i, load(z + i, width - i, -INFINITY));
      double& block = sums[start / BLOCK] = 0;
      for (int lane = 0; lane < LANES; lane++) block += sum[lane];
      all += block;
    }
    return all;
  }

  // The first of the largest logits; -1: there is none, or something is no number.
  int64_t likeliest() {
    ints odd{};
    for (int64_t start = 0; start < width; start += BLOCK) {
      floats most = -INFINITY + floats{};
      for (int64_t i = start; i < std::min(width, start + BLOCK); i += LANES) {
        const floats x = load(z + i, width - i, -INFINITY);
        most = largest(most, x), odd |= x != x;
      }
      if (!(largest_of_all(most) > top.logit)) continue;
      top = {largest_of_all(most), start};
      while (plain(z[top.id]) != top.logit) top.id++;
    }
    for (int lane = 0; lane < LANES; lane++) top.id = odd[lane] ? -1 : top.id;
    return top.logit < INFINITY ? top.id : -1;
  }

  Above above(float least) const {
    ints in{};
    Above found;
    found.share = summed([&](int64_t i, floats x) {
      in -= x >= least;
      return x >= least ? load(shares + i) : floats{};
    });
    for (int lane = 0; lane < LANES; lane++) found.count += in[lane];
    return found;
  }

  // The last of the likeliest that are so many, or have this share: halved until few are in question, which are sorted.
  Token last(int64_t most, double share, double far) const {
    const auto enough = [&](const Above& a) { return a.count >= most || a.share >= share; };
    float low = top.logit - far, high = INFINITY, at;
    Above from = above(low), beyond;
    if (!enough(from)) return {-INFINITY, width};
    for (double near = 0; from.count - beyond.count > FEW;) {
      const double middle = (near + far) / 2;
      if (at = top.logit - middle; !(low < at && at < high)) break;
      if (const Above now = above(at); enough(now)) far = middle, low = at, from = now;
      else near = middle, high = at, beyond = now;
    }
    Room<Token> between(from.count - beyond.count + 1);  // and one that is written before it is known to be outside
    Token *end = between.at(), found{};
    for (int64_t i = 0; i < width; i++) {
      *end = {plain(z[i]), i};
      end += (low <= end->logit) & (end->logit < high);
    }
    std::sort(between.at(), end);
    for (const Token* t = between.at(); t < end && !enough(beyond); t++)
      found = *t, beyond.count++, beyond.share += shares[t->id];
    return found;
  }

  // The first to which shares sum to more than this. Rounded, there may be none: then the last that has a share.
  int64_t reached(double share) const {
    int64_t among = 0, token = -1;
    for (int64_t block = 0; block * BLOCK < width; block++) {
      const double sum = sums[block];
      if (sum > 0) among = block * BLOCK;
      if (share < sum) break;
      share -= sum;
    }
    for (int64_t i = among; i < std::min(width, among + BLOCK) && share >= 0; i++)
      if (shares[i] > 0) token = i, share -= shares[i];
    return token;
  }

  int64_t drawn(const Row& r) {
    if (const int64_t first = likeliest(); first < 0 || r.temperature == 0) return first;
    const float scale = 1 / r.temperature;
    double all = summed([&](int64_t i, floats x) {
      const floats below = (x - top.logit) * scale, share = below > GONE ? exponential(below) : floats{};
      store(shares + i, share);
      return share;
    });
    const bool few = r.top_k && r.top_k < width;
    if (!few && r.top_p == 1 && r.min_p == 0) return reached(r.number * all);
    const double least = top.logit + r.temperature * std::log(r.min_p), share = r.top_p < 1 ? r.top_p * all : INFINITY;
    Token until{float(least) < least ? std::nextafter(float(least), INFINITY) : float(least), width};
    if (few || r.top_p < 1) until = std::min(until, last(few ? r.top_k : width + 1, share, -GONE * r.temperature));
    ints place;
    for (int lane = 0; lane < LANES; lane++) place[lane] = lane;
    all = summed([&](int64_t i, floats x) {
      const ints in = (x > until.logit) | ((x == until.logit) & (place + int32_t(i) <= int32_t(until.id)));
      const floats share = in ? load(shares + i) : floats{};
      store(shares + i, share);
      return share;
    });
    return reached(r.number * all);
  }
};

}  // namespace

extern "C" void FOR_THIS_SET(draw)(Row* rows, int64_t count, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1)
  for (int64_t i = 0; i < count; i++) {
    static thread_local Room<float> shares;
    static thread_local Room<double> sums;
    shares.grow(width + LANES), sums.grow(width / BLOCK + 1);
    Row& r = rows[i];
    const auto* wide = static_cast<const float*>(r.logits);
    const auto* narrow = static_cast<const uint16_t*>(r.logits);
    r.token = r.bf16 ? Drawing<uint16_t>{narrow, width, shares.at(), sums.at()}.drawn(r)
                     : Drawing<float>{wide, width, shares.at(), sums.at()}.drawn(r);
  }
}
