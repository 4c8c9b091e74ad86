// mbarriers, and the bulk copies that the async proxy does behind the threads' backs.
//
// A copy to shared memory comes as late as it can: where no thread can go on, one comes in, drawn at random. Its
// destination holds 0xFF until the phase that counts its bytes is complete. A copy from shared memory is read when it
// is waited for. What threads have written to shared memory since the last fence is not there for the async proxy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ck::simt {

struct Mbarrier {
  char* at;
  unsigned count, pending;          // arrivals of a phase, and those that its current one waits for
  uint64_t expected = 0, came = 0;  // bytes of the current phase
  unsigned phase = 0;
  unsigned maker;  // the thread that initialised it
  bool fenced = false;
};

struct BulkLoad {
  char *to, *mbarrier;
  std::vector<char> data;
  bool came = false;  // but perhaps not all that its phase waits for
};

struct BulkStore {
  char* to;
  const char* from;
  std::vector<char> data;
  unsigned group;
  bool read = false;
};

// Of a block.
struct AsyncProxy {
  std::vector<Mbarrier> mbarriers;
  std::vector<BulkLoad> loads;

  void begin_block();
  // Lets a copy come in. Returns false if none is on its way.
  bool advance();
  // Fails if a copy is still on its way.
  void end_block() const;
  // The phases that threads wait for.
  std::string describe() const;
};

// Fails if threads have written the bytes at `shared` since the last fence.
void check_fenced(const char* what, const char* shared, size_t bytes);

// Lets the copy of `data` begin. what: its name in the PTX ISA.
void start_load(const char* what, void* to, std::vector<char> data, void* mbarrier);

// What follows is called by kernels. All have the names and the rules of the PTX ISA.

void mbarrier_init(void* mbarrier, unsigned count);
void mbarrier_invalidate(void* mbarrier);
void mbarrier_arrive(void* mbarrier);
void mbarrier_expect(void* mbarrier, unsigned bytes);
// Whether the phase of this parity is complete. Waits for that, but not always until it is.
bool mbarrier_try_wait(void* mbarrier, unsigned parity);
void fence_mbarrier_init();
void fence_proxy_async();

void bulk_load(void* to, const void* from, size_t bytes, void* mbarrier);
void bulk_store(void* to, const void* from, size_t bytes);
void bulk_commit();
// Waits for all groups of this thread but the `newest`; `read`: only until they have been read.
void bulk_wait(unsigned newest, bool read);
// Called when a thread ends.
void end_bulk_stores();

}  // namespace ck::simt
