// Packed matrices: unpacked into plain numbers, and multiplied with a few rows as they are read.
//
// w = levels[code] * scale (+ offset), with one scale (and offset) for a block of numbers. Codes lie row after row, the
// first in the highest bits of a byte; three bits are a plane of two and a plane of one (deltaw/kernels/packed.py).
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

// The scales and offsets of the blocks that some rows touch: of several at once, as one row may have but a few.
constexpr int64_t BAND = 8;

struct Spans {
  std::vector<float> scale, offset;
  int64_t first = 0;

  explicit Spans(const Matrix& m)  // sixteen more, as tables are read
      : scale(BAND * m.columns / m.block + 2 + 16), offset(m.offset ? scale.size() : 0) {}

  void take(const Matrix& m, int64_t row, int64_t rows) {
    first = row * m.columns / m.block;
    const int64_t count = ((row + rows) * m.columns - 1) / m.block + 1 - first;
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
  spans.take(m, row, 1);
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

// Products of one row with `count` rows of x.
template <int width, bool coded, bool shifted, int count>
void multiply_row(const Matrix& m, const Table& table, Spans& spans, int64_t row, const float* x, float* y) {
  floats sums[count] = {};
  along(m, spans, row, [&](int64_t column, floats scale, floats offset) {
    const floats level = levels_at<width, coded>(m, table, row * m.columns + column);
    const floats w = shifted ? add_product(level, scale, offset) : level * scale;
    for (int n = 0; n < count; n++) sums[n] = add_product(w, read<floats>(x + n * m.columns + column), sums[n]);
  });
  for (int n = 0; n < count; n++) y[n * m.rows + row] = total(sums[n]);
}

// Codes of four bits lie eight to a lane of 32: a chunk of a row is one load, and x is parted to fit. Where blocks are
// a power of two and end where rows do; x is zero behind its end.
constexpr int64_t CHUNK = 8 * LANES, PARTED = CHUNK + LANES;

inline bool in_lanes(const Matrix& m) {
  return m.width == 4 && m.columns % m.block == 0 && (m.block & (m.block - 1)) == 0;
}

inline int64_t parted_columns(const Matrix& m) { return (m.columns + CHUNK - 1) / CHUNK * PARTED; }

// Of every chunk eight vectors: number k has for each lane the one whose code is 4 k bits up. Then each lane's sum.
template <typename T>
void part(const T* x, int64_t columns, float* parted) {
  for (; columns > 0; columns -= CHUNK, x += CHUNK, parted += PARTED)
    for (int64_t lane = 0; lane < LANES && 8 * lane < columns; lane++)
      for (int64_t k = 0; k < 8; k++) {
        const float value = plain(x[8 * lane + k]);
        parted[(k ^ 1) * LANES + lane] = value;  // of a byte's two codes, the first is in its upper half
        parted[CHUNK + lane] += value;
      }
}

// The codes of a chunk, and what comes behind the row; behind the last row, zeros.
inline bits codes_of(const uint8_t* at, const uint8_t* end) {
  if (at + CHUNK / 2 <= end) return read<bits>(at);
  bits codes = {};
  memcpy(&codes, at, end - at);
  return codes;
}

// Products of a band of rows with `count` rows of x, parted. Scale and offset wait until a lane is summed:
// scale * (levels x) + offset * (sum of x).
template <bool shifted, int count>
void multiply_lanes(const Matrix& m, const Table& table, Spans& spans, int64_t row, int64_t end, const float* x_NP,
                    float* y) {
  spans.take(m, row, end - row);
  const int power = __builtin_ctzll(m.block);
  bits block_of;
  for (int lane = 0; lane < LANES; lane++) block_of[lane] = 8 * lane >> power;
  const float *scales = spans.scale.data(), *offsets = spans.offset.data();
  const uint8_t *at = m.codes + row * m.columns / 2, *last = m.codes + m.rows * m.columns / 2;
  for (; row < end; row++, at += m.columns / 2, scales += m.columns >> power, offsets += m.columns >> power) {
    const float* x = x_NP;
    floats sums[count] = {};
    for (int64_t column = 0; column < m.columns; column += CHUNK, x += PARTED) {
      const bits codes = codes_of(at + column / 2, last);
      const floats scale = Table(scales + (column >> power), true).at<3>(block_of);
      const floats offset = shifted ? Table(offsets + (column >> power), true).at<3>(block_of) : floats{};
      floats levels[8];
      for (int k = 0; k < 8; k++) levels[k] = table.at<4>(codes >> 4 * k);
      for (int n = 0; n < count; n++) {
        const float* with = x + n * parted_columns(m);
        floats sum = levels[0] * read<floats>(with);
        for (int k = 1; k < 8; k++) sum = add_product(levels[k], read<floats>(with + k * LANES), sum);
        sums[n] = add_product(scale, sum, sums[n]);
        if (shifted) sums[n] = add_product(offset, read<floats>(with + CHUNK), sums[n]);
      }
    }
    for (int n = 0; n < count; n++) y[n * m.rows + row] = total(sums[n]);
  }
}

template <int width, bool coded, bool shifted, int count>
void multiply_rows(const Matrix& m, const float* x, float* y, int threads) {
  const Table table(m.levels, width < 8);
#pragma omp parallel num_threads(threads)
  {
    Spans spans(m);
#pragma omp for schedule(static)
    for (int64_t band = 0; band < m.rows; band += BAND) {
      const int64_t end = band + BAND < m.rows ? band + BAND : m.rows;
      if (width == 4 && in_lanes(m)) multiply_lanes<shifted, count>(m, table, spans, band, end, x, y);
      else
        for (int64_t row = band; row < end; row++)
          multiply_row<width, coded, shifted, count>(m, table, spans, row, x, y);
    }
  }
}

template <int width, bool coded, bool shifted, typename T>
void multiply(const Matrix& m, const T* x, T* y, int count, int threads) {
  const int64_t wide = in_lanes(m) ? parted_columns(m) : m.columns;
  std::vector<floats> whole_x((count * wide + LANES - 1) / LANES), whole_y((count * m.rows + LANES - 1) / LANES);
  float *from = (float*)whole_x.data(), *to = (float*)whole_y.data();
  for (int n = 0; n < count; n++)
    if (in_lanes(m)) part(x + n * m.columns, m.columns, from + n * wide);
    else for (int64_t i = 0; i < m.columns; i++) from[n * wide + i] = plain(x[n * m.columns + i]);
  for (int left = count; left > 0;) {  // eight, four, two rows and one, as often as they fit
    int taken;
    if (left >= 8) multiply_rows<width, coded, shifted, 8>(m, from, to, threads), taken = 8;
    else if (left >= 4) multiply_rows<width, coded, shifted, 4>(m, from, to, threads), taken = 4;
    else if (left >= 2) multiply_rows<width, coded, shifted, 2>(m, from, to, threads), taken = 2;
    else multiply_rows<width, coded, shifted, 1>(m, from, to, threads), taken = 1;
    left -= taken, from += taken * wide, to += taken * m.rows;
  }
  const float* sums = (const float*)whole_y.data();
  const int64_t all = count * m.rows;
  for (int64_t i = 0; i < all; i += LANES) store(y + i, load(sums + i), all - i);
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

// y_NO = x_NI W' for a few rows, both fp32 or both bf16; sums are fp32.
void FOR_THIS_SET(multiply)(const Matrix* m, const void* x, void* y, int count, int bf16, int threads) {
#define MULTIPLY(width, coded, shifted)                                                                        \
  {                                                                                                            \
    if (bf16) multiply<width, coded, shifted>(*m, (const uint16_t*)x, (uint16_t*)y, count, threads);           \
    else multiply<width, coded, shifted>(*m, (const float*)x, (float*)y, count, threads);                      \
  }
  CASES(MULTIPLY)
}
}
