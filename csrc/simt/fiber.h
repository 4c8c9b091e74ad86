// Fibers: contexts with a stack of their own that one OS thread switches between by hand. Floating-point control
// registers are not part of a context: they belong to the OS thread.
#pragma once

#include <cstddef>

namespace ck::simt {

class Fiber {
 public:
  // The context the caller already runs in; it has no stack of its own.
  Fiber() = default;
  // A context that runs `entry` when it is first resumed. `entry` must not return, and no exception may leave it.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Stops here and goes on in `next`, both of this OS thread, until something resumes this fiber.
  void switch_to(Fiber& next);

  // Whether `pointer` points into the stack of this fiber, which is not that of the caller.
  bool holds(const void* pointer) const;

 private:
  static void start();

  void* context_ = nullptr;
  void (*entry_)() = nullptr;
  char* mapping_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  // Known to AddressSanitizer alone: which stack the code runs on.
  void* fake_stack_ = nullptr;
};

}  // namespace ck::simt
