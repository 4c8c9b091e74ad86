// Memory for the duration of one piece of work.
#pragma once

#include <stdint.h>
#include <string.h>

#include <new>

#include "csrc/common/poison.h"

namespace ck::cpu::CK_ISA {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kReserved = false;  // so that the sanitizer sees what is used after its end
#else
constexpr bool kReserved = true;
#endif

// What a thread has given back, for its next piece of work: blocks of powers of two bytes, in a list for each size. A
// block may have come from another thread, and goes to whichever thread gives it back.
struct Reserve {
  static constexpr int kLeast = 8, kMost = 17, kSizes = kMost - kLeast + 1;  // 256 bytes to 128 KiB
  static constexpr int64_t kLimit = 1 << 18;                                 // bytes that a thread keeps
  static constexpr std::align_val_t kAlignment{64};

  struct Block {
    Block* next;
  };
  Block* blocks[kSizes];
  int64_t kept;
  enum State : int8_t { kUnused, kOpen, kClosed } state;

  // The size of a block: its list, or kSizes where it is too large to be kept.
  static int size_of(size_t bytes) {
    const size_t above = (bytes - 1) >> kLeast;
    const int size = above == 0 ? 0 : 64 - __builtin_clzll(above);
    return kReserved && size < kSizes ? size : kSizes;
  }

  void* take(size_t bytes, int size) {
    if (size == kSizes) return ::operator new(bytes, kAlignment);
    const size_t whole = size_t{1} << (kLeast + size);
    Block* const block = blocks[size];
    if (block == nullptr) return ::operator new(whole, kAlignment);
    blocks[size] = block->next;
    kept -= static_cast<int64_t>(whole);
    return block;
  }

  void give(void* memory, int size) {
    if (state == kUnused && size < kSizes) open();
    if (size == kSizes || state == kClosed || kept + (int64_t{1} << (kLeast + size)) > kLimit)
      return ::operator delete(memory, kAlignment);
    kept += int64_t{1} << (kLeast + size);
    blocks[size] = new (memory) Block{blocks[size]};
  }

 private:
  // The thread's end gives its memory back.
  struct End {
    Reserve& reserve;
    ~End() { reserve.close(); }
  };
  __attribute__((noinline)) void open() {
    thread_local const End end{*this};
    state = kOpen;
  }
  void close() {
    state = kClosed;
    for (Block*& first : blocks)
      while (Block* const block = first) {
        first = block->next;
        ::operator delete(block, kAlignment);
      }
  }
};
inline constinit thread_local Reserve reserve{};

// Memory for `count` elements and a vector of slack on top: rows may be written in whole vectors. What is asked for
// often comes from the reserve of the thread, without a call of the allocator or fresh pages.
template <class S>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    const size_t bytes = static_cast<size_t>(count) * sizeof(S) + 128;
    size_ = Reserve::size_of(bytes);
    data_ = static_cast<S*>(reserve.take(bytes, size_));
    if (poisoned()) memset(static_cast<void*>(data_), 0xff, bytes);
  }
  ~Scratch() {
    if (size_ >= 0) reserve.give(data_, size_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  S* get() const { return data_; }
  S& operator[](int64_t i) const { return data_[i]; }

 private:
  // Of no elements: an address that nothing lies at, of which nothing may be copied.
  S* data_ = reinterpret_cast<S*>(Reserve::kAlignment);
  int size_ = -1;
};

}  // namespace ck::cpu::CK_ISA
