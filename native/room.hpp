// Memory for some numbers, of whole cache lines, with nothing in it yet.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace {

template <typename T>
class Room {
  std::unique_ptr<T[], void (*)(void*)> held{nullptr, std::free};
  int64_t most = 0;

 public:
  explicit Room(int64_t count = 0) { grow(count); }

  // Room for so many at least; what was there is lost if there was too little.
  void grow(int64_t count) {
    if (count <= most) return;
    held.reset();
    held.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
    if (!held) {  // no exception finds its way out of threads, and to Python
      std::fputs("\nMemory was full. What was saved last is there: deltaw train --resume.\n", stderr);
      std::_Exit(3);
    }
    most = count;
  }
  T* at(int64_t i = 0) const { return held.get() + i; }
};

}  // namespace
