// Shared memory of a block. Every piece is allocated in exactly the size that was asked for, so that AddressSanitizer
// sees an access beyond it, and holds 0xFF, NaN in every floating-point type, when a block begins.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace ck::simt {

// What static arrays may take.
inline constexpr size_t kMaxStatic = 48 * 1024;

class Piece {
 public:
  Piece() = default;
  Piece(size_t bytes, size_t alignment) : bytes_(bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
    begin_.reset(static_cast<char*>(p));
  }

  char* begin() const { return begin_.get(); }
  size_t bytes() const { return bytes_; }

  void spoil() {
    if (bytes_ != 0) std::memset(begin_.get(), 0xFF, bytes_);
    seen_.clear();
  }

  // What the async proxy sees here.
  char* seen() {
    if (seen_.empty()) seen_.assign(bytes_, '\xff');
    return seen_.data();
  }
  void publish() {
    if (bytes_ != 0) std::memcpy(seen(), begin_.get(), bytes_);
  }

  bool holds(const void* pointer, size_t size) const {
    const auto first = reinterpret_cast<uintptr_t>(begin_.get()), p = reinterpret_cast<uintptr_t>(pointer);
    return p >= first && p - first <= bytes_ && size <= bytes_ - (p - first);
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> begin_;
  std::vector<char> seen_;
  size_t bytes_ = 0;
};

class SharedMemory {
 public:
  // most: what dynamic and static memory may take together.
  void begin_launch(size_t dynamic_bytes, size_t most) {
    require("shared memory", dynamic_bytes, most);
    most_ = most;
    arrays_.clear();
    dynamic_ = Piece(dynamic_bytes, 128);
  }

  void begin_block() {
    dynamic_.spoil();
    for (Array& array : arrays_) array.piece.spoil();
  }

  char* dynamic() const { return dynamic_.begin(); }

  // The array declared at `site`. It comes into being when the first thread reaches its declaration.
  char* array(const void* site, size_t bytes, size_t alignment) {
    size_t total = bytes;
    for (const Array& array : arrays_) {
      if (array.site == site) return array.piece.begin();
      total += array.piece.bytes();
    }
    require("static shared memory", total, kMaxStatic);
    require("shared memory", total + dynamic_.bytes(), most_);
    arrays_.push_back({site, Piece(bytes, alignment)});
    arrays_.back().piece.spoil();
    return arrays_.back().piece.begin();
  }

  bool holds(const void* pointer, size_t bytes) const {
    return dynamic_.holds(pointer, bytes) ||
           std::any_of(arrays_.begin(), arrays_.end(), [&](const Array& a) { return a.piece.holds(pointer, bytes); });
  }

  // Where the async proxy sees what lies at `pointer`, which is in shared memory: as it was at the last fence.
  char* seen(const void* pointer) {
    Piece& piece = piece_of(pointer);
    return piece.seen() + (static_cast<const char*>(pointer) - piece.begin());
  }
  void publish() {
    dynamic_.publish();
    for (Array& array : arrays_) array.piece.publish();
  }

  std::string place(const void* pointer) {
    const Piece& piece = piece_of(pointer);
    return "byte " + std::to_string(static_cast<const char*>(pointer) - piece.begin()) +
           (&piece == &dynamic_ ? " of dynamic shared memory" : " of a static array");
  }

  static void require(const char* what, size_t bytes, size_t most) {
    if (bytes > most)
      throw std::runtime_error(std::string(what) + ": at most " + std::to_string(most) + " bytes, got " +
                               std::to_string(bytes));
  }

 private:
  struct Array {
    const void* site;
    Piece piece;
  };

  Piece& piece_of(const void* pointer) {
    if (dynamic_.holds(pointer, 1)) return dynamic_;
    return std::find_if(arrays_.begin(), arrays_.end(), [&](const Array& a) { return a.piece.holds(pointer, 1); })
        ->piece;
  }

  Piece dynamic_;
  size_t most_ = 0;
  std::vector<Array> arrays_;
};

}  // namespace ck::simt
