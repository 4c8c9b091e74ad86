#include "csrc/simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// CK_SIMT_UCONTEXT selects the fallback on any machine, to test it.
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(CK_SIMT_UCONTEXT)
#define CK_SIMT_UCONTEXT
#endif

#if defined(CK_SIMT_UCONTEXT)
#include <ucontext.h>
#else
// Pushes the registers a callee must preserve, stores the stack pointer in *from, and does the reverse with `to`.
extern "C" void ck_simt_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl ck_simt_switch
  .hidden ck_simt_switch
  .type ck_simt_switch, @function
ck_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size ck_simt_switch, .-ck_simt_switch
)");
#else
asm(R"(
  .text
  .p2align 4
  .globl ck_simt_switch
  .hidden ck_simt_switch
  .type ck_simt_switch, %function
ck_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size ck_simt_switch, .-ck_simt_switch
)");
#endif
#endif

namespace ck::simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

thread_local Fiber* running = nullptr;
thread_local Fiber* previous = nullptr;

}  // namespace

Fiber::Fiber(void (*entry)()) : entry_(entry) {
  void* mapping = mmap(nullptr, page() + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  // The lowest page stays forbidden, so that an overflow stops the program.
  char* bottom = mapping_ + page();
  if (mprotect(bottom, kStackBytes, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping_, page() + kStackBytes);
    throw std::bad_alloc();
  }
  bottom_ = bottom;
  size_ = kStackBytes;
#if defined(CK_SIMT_UCONTEXT)
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, &Fiber::start, 0);
  context_ = context;
#elif defined(__x86_64__)
  // Six registers, then where `ret` goes, then the return address of start(), which is never used.
  void** top = reinterpret_cast<void**>(bottom + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&Fiber::start);
  context_ = top;
#else
  void** top = reinterpret_cast<void**>(bottom + kStackBytes) - 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(&Fiber::start);
  context_ = top;
#endif
}

Fiber::~Fiber() {
#if defined(CK_SIMT_UCONTEXT)
  delete static_cast<ucontext_t*>(context_);
#endif
  if (mapping_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom_, size_);
#endif
  munmap(mapping_, page() + kStackBytes);
}

bool Fiber::holds(const void* pointer) const {
  return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(bottom_) < size_;
}

void Fiber::start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &previous->bottom_, &previous->size_);
#endif
  running->entry_();
  __builtin_trap();
}

void Fiber::switch_to(Fiber& next) {
  previous = this;
  running = &next;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
#if defined(CK_SIMT_UCONTEXT)
  if (context_ == nullptr) context_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(next.context_));
#else
  ck_simt_switch(&context_, next.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  // The stack of the OS thread itself is learnt here, when the first fiber leaves it.
  __sanitizer_finish_switch_fiber(fake_stack_, &previous->bottom_, &previous->size_);
#endif
}

}  // namespace ck::simt
