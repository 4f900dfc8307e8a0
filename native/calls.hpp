// What the calls that a program (program.cpp) makes are told, by it or by Python.

#pragma once

#include <cstdint>

#include "lanes.hpp"

// As deltaw/kernels/attention.py lays it out.
struct Paged {
  const void *q, *k, *v;  // tokens x heads x size, tokens x kv_heads x size: sequences one after another
  void *out, *pages;
  const int64_t* spans;  // of each sequence: start, stop, and how many of its tokens are in pages already
  const int32_t* table;  // of each sequence: its pages
  int64_t sequences, heads, kv_heads, size, window;
  int64_t page, most;  // numbers from a page to the next; pages of a row of the table
  float scale;
  int32_t bf16, threads;
};

// As deltaw/kernels/worn.py lays them out. Of one layer: how many bytes from the beginning of an adapter each part lies,
// 0 where there is none.
struct Place {
  int64_t rank, A, B, gain, bias;
};
struct Each {
  const uint8_t* adapter;
  float weight;
};
// Rows that wear the same: those of `each` from `first` up to `last`.
struct Group {
  int64_t start, stop, first, last;
};
struct Worn {
  const void* x;
  void* y;
  const Group* groups;
  const Each* each;
  // What is between A and B, a row of ranks for each row of x: only made where there is no y, only used where there is no
  // x. Then A has only its part of the ranks, of so many.
  float* down;
  int64_t count, layer, inputs, outputs, x_across, y_across, down_across, part, parts;
  int32_t bf16, threads;
};

extern "C" {
void FOR_THIS_SET(norm)(const void* x, const void* gain, void* y, float* inverse, int64_t rows, int64_t width,
                        float eps, int bf16, int threads);
void FOR_THIS_SET(gated)(const void* g, const void* u, void* y, int64_t count, int gelu, int bf16, int threads);
void FOR_THIS_SET(turn)(const void* x, int64_t stride, const void* cosine, const void* sine, void* y, int64_t tokens,
                        int64_t heads, int64_t size, int64_t width, float way, int bf16, int threads);
void FOR_THIS_SET(product)(const uint16_t* x, const uint16_t* w, uint16_t* y, int64_t rows, int64_t columns,
                           int64_t depth, int64_t across, int64_t stride, int threads);
void FOR_THIS_SET(paged)(const Paged* p);
void FOR_THIS_SET(wear)(const Worn* w);
}
