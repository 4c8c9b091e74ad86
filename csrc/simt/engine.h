// The state of a launch: threads as fibers, the warps they form, and who goes next.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/simt/block.h"
#include "csrc/simt/bulk.h"
#include "csrc/simt/fiber.h"
#include "csrc/simt/groups.h"
#include "csrc/simt/products.h"
#include "csrc/simt/shared.h"

namespace ck::simt {

inline constexpr unsigned kWarp = 32;

// Thrown in the threads that still wait when a launch fails, so that their stacks are left in order.
struct Stop {};

struct Random {
  uint64_t state;
  // SplitMix64.
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return static_cast<unsigned>(((next() >> 32) * n) >> 32); }
  template <class T>
  void shuffle(T* values, unsigned n) {
    for (unsigned i = n; i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }
};

struct Copy {
  char* to;
  unsigned char data[16];
  unsigned bytes;
  unsigned group;
};

struct Thread {
  explicit Thread(void (*entry)()) : fiber(entry) {}

  enum State { kFresh, kStarted, kExited };

  Fiber fiber;
  uint3 index{};
  unsigned id = 0;
  State state = kFresh;
  // What it waits at. The mask is 0 where that is not for lanes of its warp, and the operand then nullptr where it is
  // not for the whole block.
  const Collective* waits = nullptr;
  unsigned mask = 0;
  void* operand = nullptr;
  const char* mbarrier = nullptr;  // whose current phase it waits for
  unsigned barrier = 0;            // the named one that it waits at
  std::vector<Copy> copies;
  unsigned group = 0;
  std::vector<BulkStore> stores;
  unsigned bulk_group = 0;
  // The calls that led to where it is, as one number each.
  std::vector<uint64_t> path;
};

struct Gathering {
  const Collective* what;
  unsigned mask;
  unsigned arrived;
};

struct Warp {
  unsigned lanes;
  unsigned ready;
  unsigned gatherings;
  Gathering gathering[kWarp];
};

struct Engine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  SharedMemory shared;
  AsyncProxy async;
  Groups groups;
  std::vector<WarpProducts> products;  // of each warp
  std::unique_ptr<Tally> tally;        // of a launch that is counted
  Fiber scheduler;
  Random random{0};
  const Launch* launch = nullptr;
  uint64_t architecture = 0;
  unsigned count = 0;
  Thread* queue[kWarp];
  unsigned next = 0, end = 0;
  int barrier_count = 0;
  bool stopping = false;
  std::string failure;

  // Goes on in the next thread of the queue, or in the scheduler if there is none or something has failed.
  void leave(Fiber& from);
  void suspend();
  void report(const std::string& what);
  // A fiber runs one thread after another, one in each block.
  static void body();
  void step(Warp& warp, unsigned first_thread);
  // Called when no thread can run. True if all wait at the same barrier, which is then opened, or if a bulk copy was on
  // its way, or a product, which has now come.
  bool go_on();
  bool advance();
  void open_barrier(int predicates);
  void meet_all();
  std::string describe(unsigned exited) const;
  void prepare(unsigned threads_in_block);
  void run_block();
  void unwind();
  void run_grid(uint64_t seed);
};

// Of this OS thread: its engine, and the thread of the grid that runs; nullptr outside of a launch.
extern constinit thread_local Engine* engine;
extern constinit thread_local Thread* current;

}  // namespace ck::simt
