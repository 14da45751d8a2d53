// Memory that a thread keeps between calls for the blocks that a kernel packs: under a few MB, grown on demand.
#pragma once

#include <cstdlib>

#include "cpu/isa.h"

namespace flexdit::cpu::FLEXDIT_ISA {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // Forgets what was taken and makes room for `count` values of A and `pieces` alignment gaps.
  template <class A>
  void reset(int64_t count, int64_t pieces) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(A) + static_cast<size_t>(pieces) * 64;
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = (bytes + 63) / 64 * 64;
      data_ = static_cast<char*>(std::aligned_alloc(64, capacity_));
      if (!data_) std::abort();  // out of memory for a few MB inside a parallel region: nobody could unwind
    }
    used_ = 0;
  }
  template <class A>
  A* take(int64_t count) {
    A* piece = reinterpret_cast<A*>(data_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return piece;
  }

 private:
  char* data_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace flexdit::cpu::FLEXDIT_ISA
