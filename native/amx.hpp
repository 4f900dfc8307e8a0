// A square of sums in AMX's tiles: two by two of 16 rows and 16 columns each.

#pragma once

#include <cstdint>

#include "lanes.hpp"

namespace {

struct alignas(64) Layout {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What was written so far is in memory: GCC does not know that tiles are loaded from there.
inline void written(const void* at) { __asm__ volatile("" ::"r"(at) : "memory"); }

// While it lives, this thread can have a square: its tiles are all of full size.
struct Ready {
  Ready() {
    const Layout all;
    written(&all);
    _tile_loadconfig(&all);
  }
  ~Ready() { _tile_release(); }
};

// One at a time, in the tiles 0 to 3.
class Square {
  float* at;
  int64_t ld;

 public:
  Square(float* at, int64_t ld, bool is_new) : at(at), ld(ld) {
    if (is_new) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    written(at);
    _tile_loadd(0, at, ld * 4);
    _tile_loadd(1, at + 16, ld * 4);
    _tile_loadd(2, at + 16 * ld, ld * 4);
    _tile_loadd(3, at + 16 * ld + 16, ld * 4);
  }

  void done() const {
    _tile_stored(0, at, ld * 4);
    _tile_stored(1, at + 16, ld * 4);
    _tile_stored(2, at + 16 * ld, ld * 4);
    _tile_stored(3, at + 16 * ld + 16, ld * 4);
    written(at);
  }

  // Adds a b, all columns or half of them; b passes by, and does not push a out of the nearest cache.
  template <int halves = 2>
  void add(Rows a, Pairs b, int64_t depth) {
    written(a.at);
    for (int64_t p = 0; p < depth; p += SIDE, a.at += a.next, b.at += SIDE / 2 * b.stride) {
      if (a.asks)
        for (int64_t row = SIDE; row < 2 * SIDE; row++) _mm_prefetch(a.at + row * a.across, _MM_HINT_T0);
      _tile_loadd(4, a.at, a.across * 2);
      _tile_loadd(5, a.at + 16 * a.across, a.across * 2);
      _tile_stream_loadd(6, b.at, b.stride * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (halves == 2) {
        _tile_stream_loadd(7, b.at + 16, b.stride * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
};

}  // namespace
