// Numbers in words of as many as are multiplied at once: two of bf16, one above the other, or one of fp32.

#pragma once

#include <cstdint>

#include "lanes.hpp"
#if defined(__AVX512BF16__)
#include "bf16.hpp"
#else
namespace {
constexpr int64_t SIDE = 32;
}
#endif

namespace {

template <typename T>
struct Words;

template <>
struct Words<float> {
  typedef float word;
  static constexpr int64_t EACH = 1;
  static floats add(floats sum, float a, bits b) { return add_product(a - floats{}, (floats)b, sum); }
};

template <>
struct Words<uint16_t> {
  typedef uint32_t word;
  static constexpr int64_t EACH = 2;
  static floats add(floats sum, uint32_t a, bits b) {
#if defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
    sum = add_product(plain(uint16_t(a)) - floats{}, (floats)(b << 16), sum);
    return add_product(plain(uint16_t(a >> 16)) - floats{}, (floats)(b & 0xffff0000u), sum);
#endif
  }
};

}  // namespace
