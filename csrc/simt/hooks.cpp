// The functions that gcc -fsanitize=thread calls before loads and stores and where a function begins and ends, here
// made to count what kernels do: ThreadSanitizer's own library is not linked. And what Python calls to have launches
// counted.
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>

#include "csrc/simt/block.h"

namespace {

using namespace ck::simt;

// As accesses of 16, 8, 4, 2 and 1 byte, as far as the address is aligned.
void count_range(bool write, const char* p, size_t bytes, const void* instruction) {
  while (bytes != 0) {
    const size_t aligned = size_t{1} << std::countr_zero(reinterpret_cast<uintptr_t>(p) | 16);
    const size_t piece = std::min(aligned, std::bit_floor(bytes));
    count_access(write, p, piece, instruction);
    p += piece;
    bytes -= piece;
  }
}

}  // namespace

#define CK_HOOK(name, write, bytes) \
  void name(void* p) { count_access(write, p, bytes, __builtin_return_address(0)); }
#define CK_HOOKS(bytes)                               \
  CK_HOOK(__tsan_read##bytes, false, bytes)           \
  CK_HOOK(__tsan_write##bytes, true, bytes)           \
  CK_HOOK(__tsan_unaligned_read##bytes, false, bytes) \
  CK_HOOK(__tsan_unaligned_write##bytes, true, bytes)

extern "C" {

CK_HOOKS(1)
CK_HOOKS(2)
CK_HOOKS(4)
CK_HOOKS(8)
CK_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  count_range(false, static_cast<const char*>(p), bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  count_range(true, static_cast<const char*>(p), bytes, __builtin_return_address(0));
}
void __tsan_func_entry(void* caller) { enter_function(caller); }
void __tsan_func_exit() { leave_function(); }
void __tsan_init() {}
// Before the table of an object's virtual functions is written.
void __tsan_vptr_update(void**, void*) {}
// The guard of a static variable.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

#define CK_EXPORT __attribute__((visibility("default")))

CK_EXPORT void ck_start_counting() { start_counting(); }

// The launches since, as JSON. A kernel is given by its distance from the beginning of this library.
CK_EXPORT const char* ck_stop_counting() {
  static constexpr const char* kAccessNames[kAccesses] = {"load",         "store",      "copy_read",   "shared_load",
                                                          "shared_store", "copy_write", "matrix_load", "operand_read"};
  static constexpr const char* kMeetingNames[kMeetings] = {
      "barriers", "warp_barriers", "shuffles", "votes", "matrix_loads", "matrix_products", "warpgroup_products"};
  thread_local std::string text;
  text.clear();
  const auto add = [](const std::string& name, uint64_t value) {
    text += ", \"" + name + "\": " + std::to_string(value);
  };
  const auto add_requests = [&](unsigned access, const Requests& r) {
    const std::string name = kAccessNames[access];
    add(name + "_requests", r.requests);
    add(name + "_bytes", r.bytes);
    if (is_global(static_cast<Access>(access))) {
      add(name + "_sectors", r.sectors);
    } else {
      add(name + "_wavefronts", r.wavefronts);
      add(name + "_conflicts", r.conflicts);
    }
  };
  for (const Counted& launch : stop_counting()) {
    Dl_info library{};
    dladdr(launch.kernel, &library);
    const auto place = [&](const void* code) {
      return std::to_string(static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase));
    };
    text += (text.empty() ? "[{\"kernel\": " : "}, {\"kernel\": ") + place(launch.kernel);
    const Counts& c = launch.counts;
    add("blocks", c.blocks);
    add("threads", c.blocks * launch.block.x * launch.block.y * launch.block.z);
    add("bytes_read", c.bytes_read);
    add("bytes_written", c.bytes_written);
    for (unsigned i = 0; i < kMeetings; ++i) add(kMeetingNames[i], c.meetings[i]);
    for (unsigned i = 0; i < kAccesses; ++i) add_requests(i, c.accesses[i]);
    text += ", \"instructions\": [";
    bool first = true;
    for (const auto& [what, requests] : launch.instructions) {
      text += (first ? "{\"place\": " : "}, {\"place\": ") + place(what.first);
      add_requests(static_cast<unsigned>(what.second), requests);
      first = false;
    }
    text += first ? "]" : "}]";
  }
  text += text.empty() ? "[]" : "}]";
  return text.c_str();
}

}  // extern "C"
