// A block's shared memory: poisoned pieces with canaries between them. Without AddressSanitizer a write beyond a piece
// is seen in the canaries at the block's end, and a read beyond it gives NaN, as the canaries are.
#pragma once

#include <cstring>
#include <vector>

#include "emulator/emulator.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace emulator {

constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block on sm_90
constexpr unsigned char kPoison = 0xff;

class SharedMemory {
 public:
  SharedMemory() : bytes_(kMaxSharedBytes + 64 * (kGuardBytes + 16) + 128) {
    ASAN_POISON_MEMORY_REGION(bytes_.data(), bytes_.size());
  }
  ~SharedMemory() { ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size()); }

  void begin_block() {
    ASAN_POISON_MEMORY_REGION(bytes_.data(), bytes_.size());
    pieces_.clear();
    used_ = 0;
    guard((128 - reinterpret_cast<uintptr_t>(bytes_.data()) % 128) % 128);  // the dynamic piece comes next, aligned
  }
  // The same memory for the same key within a block.
  unsigned char* piece(const void* key, size_t size) {
    for (const Piece& piece : pieces_)
      if (piece.key == key) return piece.data;
    size_t total = size;
    for (const Piece& piece : pieces_) total += piece.size;
    if (total > kMaxSharedBytes) fail("needs " + std::to_string(total) + " bytes of shared memory");
    unsigned char* data = bytes_.data() + used_;
    if (used_ + size + kGuardBytes + 16 > bytes_.size()) fail("has too many shared arrays for the emulator");
    ASAN_UNPOISON_MEMORY_REGION(data, size);
    std::memset(data, kPoison, size);
    pieces_.push_back({key, data, size});
    used_ += size;
    guard((16 - size % 16) % 16);
    return data;
  }
  // Whether all bytes lie in one piece.
  bool holds(const void* address, size_t bytes) const {
    const auto* begin = static_cast<const unsigned char*>(address);
    for (const Piece& piece : pieces_)
      if (begin >= piece.data && begin + bytes <= piece.data + piece.size) return true;
    return false;
  }
  // Whether nobody wrote before or behind a piece.
  bool intact() {
    ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), used_);
    size_t at = 0;
    const auto canaries = [&](size_t end) {
      for (; at < end; ++at)
        if (bytes_[at] != canary(at)) return false;
      return true;
    };
    for (const Piece& piece : pieces_) {
      const size_t begin = static_cast<size_t>(piece.data - bytes_.data());
      if (!canaries(begin)) return false;
      at = begin + piece.size;
    }
    return canaries(used_);
  }

 private:
  static constexpr size_t kGuardBytes = 256;
  struct Piece {
    const void* key;
    unsigned char* data;
    size_t size;
  };
  // Together a NaN of every type, but not the poison.
  unsigned char canary(size_t at) const { return reinterpret_cast<uintptr_t>(bytes_.data() + at) % 2 ? 0xff : 0xfd; }
  void guard(size_t padding) {
    ASAN_UNPOISON_MEMORY_REGION(bytes_.data() + used_, kGuardBytes + padding);
    for (size_t i = 0; i < kGuardBytes + padding; ++i) bytes_[used_ + i] = canary(used_ + i);
    ASAN_POISON_MEMORY_REGION(bytes_.data() + used_, kGuardBytes + padding);
    used_ += kGuardBytes + padding;
  }

  std::vector<unsigned char> bytes_;
  std::vector<Piece> pieces_;
  size_t used_ = 0;
};

}  // namespace emulator
