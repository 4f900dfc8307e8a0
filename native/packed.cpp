// Packed matrices: unpacked into plain numbers, and multiplied with a few rows as they are read.
//
// w = levels[code] * scale (+ offset), with one scale (and offset) for a block of numbers. Codes lie row after row, the
// first in the highest bits of a byte; three bits are a plane of two and a plane of one (deltaw/weights/bits.py).
// Compiled once for every instruction set (CMakeLists.txt); what is unpacked is the same to the last bit on each.

#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.hpp"

namespace {

enum Kind : int32_t { NONE, FP32, FP16, NESTED };

// As deltaw/kernels/packed.py lays it out.
struct Matrix {
  const uint8_t* codes;
  const float* levels;    // of 2**width codes; null: a code stands for itself
  const void* scale;      // a block: fp32, fp16, or 8-bit codes into `nested`
  const void* offset;     // a block: fp32 or fp16
  const float* nested;    // 256 values
  const float* most;      // of 256 scales: times the nested value
  const float* mean;      // one number: added to it
  int64_t rows, columns, block;
  int32_t width, scale_kind, offset_kind;
};

// Numbers first, first + 1, ... as fp32.
inline void numbers(const void* at, int32_t kind, int64_t first, int64_t count, float* out) {
  if (kind == FP32) {
    memcpy(out, static_cast<const float*>(at) + first, 4 * count);
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(at) + first;
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(half + i))));
#endif
  for (; i < count; i++) out[i] = of_half(half[i]);
}

// The scales and offsets of the blocks that one row touches.
struct Spans {
  std::vector<float> scale, offset;
  int64_t first = 0;

  explicit Spans(const Matrix& m) : scale(m.columns / m.block + 2), offset(m.offset ? scale.size() : 0) {}

  void take(const Matrix& m, int64_t row) {
    first = row * m.columns / m.block;
    const int64_t count = ((row + 1) * m.columns - 1) / m.block + 1 - first;
    if (m.offset) numbers(m.offset, m.offset_kind, first, count, offset.data());
    if (m.scale_kind != NESTED) return numbers(m.scale, m.scale_kind, first, count, scale.data());
    const uint8_t* code = static_cast<const uint8_t*>(m.scale) + first;
    for (int64_t i = 0; i < count; i++) {
      const float taken = m.nested[code[i]] * m.most[(first + i) >> 8];
      scale[i] = taken + m.mean[0];
    }
  }
};

template <int width>
inline bits codes_at(const Matrix& m, const uint8_t* plane, int64_t i) {
  if constexpr (width == 3) return pieces<2>(m.codes, i) | pieces<1>(plane, i) << 2;
  return pieces<width == 3 ? 2 : width>(m.codes, i);
}

// Calls take(column, scale, offset) for every LANES numbers along one row; no block ends within them.
template <typename Take>
inline void along(const Matrix& m, Spans& spans, int64_t row, Take take) {
  spans.take(m, row);
  const int64_t first = row * m.columns;
  int64_t column = 0;
  for (int64_t i = 0; column < m.columns; i++) {
    const int64_t until = (spans.first + i + 1) * m.block - first, end = until < m.columns ? until : m.columns;
    const floats scale = spans.scale[i] - floats{}, offset = m.offset ? spans.offset[i] - floats{} : floats{};
    for (; column < end; column += LANES) take(column, scale, offset);
  }
}

template <int width, bool coded>
inline floats levels_at(const Matrix& m, const Table& table, int64_t i) {
  const uint8_t* plane = m.codes + (m.rows * m.columns * 2 + 7) / 8;
  const bits codes = codes_at<width>(m, plane, i);
  if constexpr (coded || (WIDENS && width < 8)) return table.at<width>(codes);
  return __builtin_convertvector((ints)codes, floats);
}

inline void put(void* out, int64_t at, floats w, bool bf16) {
  if (bf16) store(static_cast<uint16_t*>(out) + at, w);
  else store(static_cast<float*>(out) + at, w);
}

template <int width, bool coded, bool shifted>
void unpack_rows(const Matrix& m, void* out, bool bf16, int threads) {
  const Table table(m.levels, width < 8);
#pragma omp parallel num_threads(threads)
  {
    Spans spans(m);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < m.rows; row++)
      along(m, spans, row, [&](int64_t column, floats scale, floats offset) {
        const floats scaled = levels_at<width, coded>(m, table, row * m.columns + column) * scale;
        put(out, row * m.columns + column, shifted ? scaled + offset : scaled, bf16);
      });
  }
}

// Of every two numbers, the first to one vector and the second to the next: so the halves of a byte have them.
void part(const float* x, int64_t count, float* parted) {
  for (int64_t i = 0; i < count; i += 2 * LANES)
    for (int lane = 0; lane < LANES; lane++) {
      parted[i + lane] = x[i + 2 * lane];
      parted[i + LANES + lane] = x[i + 2 * lane + 1];
    }
}

// Sums of the products of one row with `count` of x. Two chains of each: one would wait for itself.
template <bool shifted, int count>
struct Sums {
  static constexpr int CHAINS = count < 4 ? 2 : 1;
  floats of[CHAINS][count] = {};

  void add(floats level, floats scale, floats offset, const float* x, int64_t columns, int chain) {
    const floats w = shifted ? add_product(level, scale, offset) : level * scale;
    for (int n = 0; n < count; n++)
      of[chain % CHAINS][n] = add_product(w, read<floats>(x + n * columns), of[chain % CHAINS][n]);
  }

  void store(float* y, int64_t rows) const {
    for (int n = 0; n < count; n++) y[n * rows] = total(CHAINS == 2 ? of[0][n] + of[1][n] : of[0][n]);
  }
};

template <int width, bool coded, bool shifted, int count>
void multiply_row(const Matrix m, const Table table, Spans& spans, int64_t row, const float* x, float* y) {
  Sums<shifted, count> sums;
  along(m, spans, row, [&](int64_t column, floats scale, floats offset) {
    const floats level = levels_at<width, coded>(m, table, row * m.columns + column);
    sums.add(level, scale, offset, x + column, m.columns, 0);
  });
  sums.store(y + row, m.rows);
}

// The two halves of bytes as they lie: x is parted, blocks end where rows do.
template <bool shifted, int count>
void multiply_pairs(const Matrix m, const Table table, Spans& spans, int64_t row, const float* x, float* y) {
  spans.take(m, row);
  const float *scales = spans.scale.data(), *offsets = spans.offset.data();
  const uint8_t* at = m.codes + row * m.columns / 2;
  Sums<shifted, count> sums;
  for (int64_t column = 0; column < m.columns; scales++, offsets++) {
    const floats scale = *scales - floats{}, offset = shifted ? *offsets - floats{} : floats{};
    for (const int64_t end = column + m.block; column < end; column += 2 * LANES, at += LANES) {
      const bits two = pieces<8>(at, 0);
      sums.add(table.at<4>(two >> 4), scale, offset, x + column, m.columns, 0);
      sums.add(table.at<4>(two), scale, offset, x + column + LANES, m.columns, 1);
    }
  }
  sums.store(y + row, m.rows);
}

template <int width, bool coded, bool shifted, int count>
void multiply_rows(const Matrix& m, const float* x, float* y, bool pairs, int threads) {
  const Table table(m.levels, width < 8);
#pragma omp parallel num_threads(threads)
  {
    Spans spans(m);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < m.rows; row++)
      if (width == 4 && pairs) multiply_pairs<shifted, count>(m, table, spans, row, x, y);
      else multiply_row<width, coded, shifted, count>(m, table, spans, row, x, y);
  }
}

template <int width, bool coded, bool shifted>
void multiply(const Matrix& m, const float* x, float* y, int count, int threads) {
  const bool pairs = WIDENS && width == 4 && m.columns % m.block == 0 && m.block % (2 * LANES) == 0;
  std::vector<float> parted(pairs ? count * m.columns : 0);
  if (pairs) part(x, count * m.columns, parted.data()), x = parted.data();
  for (int n = 0; n < count;) {  // eight, four, two rows and one, as often as they fit
    const float* from = x + n * m.columns;
    float* to = y + n * m.rows;
    const int left = count - n;
    if (left >= 8) multiply_rows<width, coded, shifted, 8>(m, from, to, pairs, threads), n += 8;
    else if (left >= 4) multiply_rows<width, coded, shifted, 4>(m, from, to, pairs, threads), n += 4;
    else if (left >= 2) multiply_rows<width, coded, shifted, 2>(m, from, to, pairs, threads), n += 2;
    else multiply_rows<width, coded, shifted, 1>(m, from, to, pairs, threads), n += 1;
  }
}

}  // namespace

extern "C" {

#define CASES(call)                                                                                    \
  switch (m->width) {                                                                                  \
    case 2: if (m->levels) call(2, true, false) else call(2, false, true) break;                       \
    case 3: if (m->levels) call(3, true, false) else call(3, false, true) break;                       \
    case 4: if (m->levels) call(4, true, false) else call(4, false, true) break;                       \
    case 8: if (m->levels) call(8, true, false) else call(8, false, true) break;                       \
  }

// Writes rows x columns numbers, as fp32 or bf16.
void FOR_THIS_SET(unpack)(const Matrix* m, void* out, int bf16, int threads) {
#define UNPACK(width, coded, shifted) { unpack_rows<width, coded, shifted>(*m, out, bf16, threads); }
  CASES(UNPACK)
}

// y_NO = x_NI W' for a few rows, in fp32.
void FOR_THIS_SET(multiply)(const Matrix* m, const float* x, float* y, int count, int threads) {
#define MULTIPLY(width, coded, shifted) { multiply<width, coded, shifted>(*m, x, y, count, threads); }
  CASES(MULTIPLY)
}
}
