// The layers of a model as a list of calls, made once: where rows are few, Python takes longer to ask for each than it
// takes. Where a processor multiplies bf16.

#if defined(__AVX512BF16__)

#include "calls.hpp"

enum Kind { NORM, PRODUCT, ADD, TURN, PAGED, GATED, WEAR };

// As deltaw/kernels/worn.py lays them out. What places and sizes mean is said where they are used.
struct Op {
  int64_t kind;
  uint16_t* at[5];
  int64_t n[4];
  double number;
};
struct Angles {
  const uint16_t *cosine, *sine;
  int64_t width;
};
// What is another for every step; of `paged` and `worn` what is the same at all layers.
struct Program {
  const Op* ops;
  int64_t count, rows;
  Angles angles[2];
  Paged paged;
  Worn worn;
  int32_t threads;
};

namespace {

// x += y, of which every row is the same if `across` is 0.
void add(uint16_t* x, const uint16_t* y, int64_t rows, int64_t width, int64_t across) {
  for (int64_t row = 0; row < rows; row++, x += width, y += across)
    for (int64_t i = 0; i < width; i += LANES) store(x + i, load(x + i) + load(y + i));
}

void run(const Program& p, const Op& op) {
  const auto& [kind, at, n, number] = op;
  switch (kind) {
    case NORM:  // of rows of n[0] numbers, n[1] in a token
      return FOR_THIS_SET(norm)(at[0], at[1], at[2], (float*)at[3], p.rows * n[1], n[0], number, 1, p.threads);
    case PRODUCT:  // n[0] columns, n[1] deep
      return FOR_THIS_SET(product)(at[0], at[1], at[2], p.rows, n[0], n[1], n[1], n[2], p.threads);
    case ADD:  // n[0] numbers in a row
      return add(at[0], at[1], p.rows, n[0], n[1]);
    case TURN: {  // n[0] heads of n[1] numbers, by the angles of this number
      const Angles& by = p.angles[n[2]];
      return FOR_THIS_SET(turn)(at[0], n[0] * n[1], by.cosine, by.sine, at[0], p.rows, n[0], n[1], by.width, 1, 1,
                                p.threads);
    }
    case PAGED: {  // heads, heads of keys, size and window
      Paged all = p.paged;
      all.q = at[0], all.k = at[1], all.v = at[2], all.out = at[3], all.pages = at[4];
      all.heads = n[0], all.kv_heads = n[1], all.size = n[2], all.window = n[3], all.scale = number;
      return FOR_THIS_SET(paged)(&all);
    }
    case GATED:  // n[0] numbers in a row
      return FOR_THIS_SET(gated)(at[0], at[1], at[0], p.rows * n[0], n[1], 1, p.threads);
    case WEAR:  // at layer n[0], from n[1] numbers to n[2]
      if (!p.worn.count) return;
      Worn all = p.worn;
      all.x = at[0], all.y = at[1], all.layer = n[0];
      all.inputs = all.x_across = n[1], all.outputs = all.y_across = n[2];
      return FOR_THIS_SET(wear)(&all);
  }
}

}  // namespace

extern "C" void FOR_THIS_SET(program)(const Program* p) {
  for (int64_t i = 0; i < p->count; i++) run(*p, p->ops[i]);
}

#endif
