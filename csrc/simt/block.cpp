#include "csrc/simt/block.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "csrc/simt/fiber.h"
#include "csrc/simt/shared.h"

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace ck::simt {
namespace {

constexpr unsigned kWarp = 32;

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
  // What it waits at. The mask is 0 where the whole block takes part.
  const Collective* waits = nullptr;
  unsigned mask = 0;
  void* operand = nullptr;
  std::vector<Copy> copies;
  unsigned group = 0;
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

struct Engine;
constinit thread_local Engine* engine = nullptr;
constinit thread_local Thread* current = nullptr;

struct Engine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  SharedMemory shared;
  std::unique_ptr<Tally> tally;  // of a launch that is counted
  Fiber scheduler;
  Random random{0};
  const Launch* launch = nullptr;
  unsigned count = 0;
  Thread* queue[kWarp];
  unsigned next = 0, end = 0;
  int barrier_count = 0;
  bool stopping = false;
  std::string failure;

  // Goes on in the next thread of the queue, or in the scheduler if there is none or something has failed.
  void leave(Fiber& from) {
    if (next == end || !failure.empty()) {
      from.switch_to(scheduler);
      return;
    }
    Thread& thread = *queue[next++];
    current = &thread;
    threadIdx = thread.index;
    from.switch_to(thread.fiber);
  }

  void suspend() {
    leave(current->fiber);
    if (stopping) throw Stop{};
  }

  void report(const std::string& what) {
    if (!failure.empty()) return;
    const auto text = [](const uint3& i) {
      return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
    };
    std::string file = launch->where.file_name();
    file.erase(0, file.rfind('/') + 1);
    failure = "simt: launch at " + file + ":" + std::to_string(launch->where.line()) + " in " +
              launch->where.function_name() + ", block " + text(blockIdx) +
              (current != nullptr ? ", thread " + text(current->index) : std::string()) + ": " + what;
  }

  // A fiber runs one thread after another, one in each block.
  static void body() {
    for (;;) {
      Engine& self = *engine;
      current->state = Thread::kStarted;
      try {
        self.launch->call(self.launch->arguments);
      } catch (const Stop&) {
      } catch (const std::exception& error) {
        self.report(error.what());
      } catch (...) {
        self.report("an exception of an unknown type");
      }
      current->state = Thread::kExited;
      current->waits = nullptr;
      self.leave(current->fiber);
    }
  }

  void step(Warp& warp, unsigned first_thread) {
    next = end = 0;
    for (unsigned left = warp.ready; left != 0; left &= left - 1)
      queue[end++] = threads[first_thread + static_cast<unsigned>(__builtin_ctz(left))].get();
    warp.ready = 0;
    random.shuffle(queue, end);
    leave(scheduler);
    current = nullptr;
  }

  // Nobody can run. True if that is because all wait at the same barrier, which is then opened.
  bool open_barrier() {
    const Thread& some = *threads[0];
    unsigned same = 0, exited = 0;
    int predicates = 0;
    for (unsigned i = 0; i < count; ++i) {
      const Thread& t = *threads[i];
      exited += t.state == Thread::kExited;
      if (t.waits == nullptr || t.waits != some.waits || t.mask != 0) continue;
      ++same;
      predicates += *static_cast<const bool*>(t.operand);
    }
    if (exited == count) return false;
    if (same != count) {
      report(describe(exited));
      return false;
    }
    barrier_count = predicates;
    if (tally) {
      tally->count(Meeting::kBarrier);
      meet_all();
    }
    for (unsigned i = 0; i < count; ++i) threads[i]->waits = nullptr;
    for (Warp& warp : warps) warp.ready = warp.lanes;
    random.shuffle(order.data(), static_cast<unsigned>(order.size()));
    return true;
  }

  void meet_all() {
    for (unsigned w = 0; w < warps.size(); ++w) tally->meet(w);
  }

  std::string describe(unsigned exited) const {
    std::map<std::string, unsigned> waiting;
    for (unsigned i = 0; i < count; ++i) {
      const Thread& t = *threads[i];
      if (t.waits == nullptr) continue;
      char mask[32] = "";
      if (t.mask != 0) std::snprintf(mask, sizeof mask, " (mask 0x%08x)", t.mask);
      ++waiting[std::string(t.waits->name) + mask];
    }
    std::string text;
    for (const auto& [where, n] : waiting)
      text +=
          (text.empty() ? "" : ", ") + std::to_string(n) + (n == 1 ? " thread waits at " : " threads wait at ") + where;
    return text + ", " + std::to_string(exited) + (exited == 1 ? " has exited" : " have exited");
  }

  void prepare(unsigned threads_in_block) {
    count = threads_in_block;
    while (threads.size() < count) threads.push_back(std::make_unique<Thread>(&Engine::body));
    const dim3& shape = launch->block;
    for (unsigned i = 0; i < count; ++i) {
      threads[i]->id = i;
      threads[i]->index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    }
    warps.resize((count + kWarp - 1) / kWarp);
    order.resize(warps.size());
    std::iota(order.begin(), order.end(), 0u);
  }

  void run_block() {
    shared.begin_block();
    for (unsigned i = 0; i < count; ++i) {
      Thread& t = *threads[i];
      t.state = Thread::kFresh;
      t.waits = nullptr;
      t.copies.clear();
      t.group = 0;
      t.path.assign(1, 0);
    }
    if (tally) tally->begin_block(static_cast<unsigned>(warps.size()));
    for (unsigned w = 0; w < warps.size(); ++w) {
      const unsigned lanes = std::min(kWarp, count - w * kWarp);
      warps[w].lanes = warps[w].ready = ~0u >> (kWarp - lanes);
      warps[w].gatherings = 0;
    }
    random.shuffle(order.data(), static_cast<unsigned>(order.size()));
    do {
      // One warp runs far ahead of the next, which shows more mistakes than running all at the same pace. Now and then
      // it has to let the others pass.
      for (unsigned i = 0; i < order.size();) {
        const unsigned w = order[i];
        if (warps[w].ready == 0) {
          ++i;
          continue;
        }
        step(warps[w], w * kWarp);
        if (!failure.empty()) return unwind();
        if (random.below(8) == 0) {
          order.erase(order.begin() + i);
          order.push_back(w);
        }
      }
    } while (open_barrier());
    if (!failure.empty()) return unwind();
    if (tally) meet_all();
  }

  void unwind() {
    stopping = true;
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i]->state != Thread::kStarted) continue;
      current = threads[i].get();
      threadIdx = current->index;
      scheduler.switch_to(current->fiber);
    }
    stopping = false;
    current = nullptr;
  }

  void run_grid(uint64_t seed) {
    const dim3& grid = launch->grid;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    random.state = seed;
    uint64_t stride = 1, block = 0;
    if (blocks > 1) block = random.next() % blocks;
    if (blocks > 2) {
      do stride = 1 + random.next() % (blocks - 1);
      while (std::gcd(stride, blocks) != 1);
    }
    for (uint64_t i = 0; i < blocks && failure.empty(); ++i, block = (block + stride) % blocks) {
      blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                  static_cast<unsigned>(block / grid.x / grid.y)};
      run_block();
    }
  }
};

std::string problem_with(const Launch& launch) {
  const dim3 &g = launch.grid, &b = launch.block;
  const auto show = [](const dim3& d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  if (g.x < 1 || g.y < 1 || g.z < 1 || g.x > 0x7fffffffu || g.y > 0xffffu || g.z > 0xffffu)
    return "the grid must have 1 to 2147483647 x 65535 x 65535 blocks, got " + show(g);
  if (b.x < 1 || b.y < 1 || b.z < 1 || b.x > 1024 || b.y > 1024 || b.z > 64 || uint64_t{b.x} * b.y * b.z > 1024)
    return "a block must have 1 to 1024 threads, at most 64 of them in z, got " + show(b);
  return "";
}

std::atomic<bool> counting = false;
std::mutex counted_mutex;
std::vector<Counted> counted;

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  const uint64_t value = std::strtoull(text, &end, 10);
  if (end == text || *end != 0)
    throw std::runtime_error(std::string(name) + ": expected a whole number, got '" + text + "'");
  return value;
}

}  // namespace

// By default what sm_90 has.
size_t shared_memory_limit() { return from_environment("CONVKERNELS_SIMT_SHARED", 227 * 1024); }

const char* run(const Launch& launch) {
  thread_local std::unique_ptr<Engine> mine;
  thread_local std::string status;
  try {
    if (current != nullptr) throw std::runtime_error("a kernel cannot launch another one");
    if (const std::string why = problem_with(launch); !why.empty()) throw std::runtime_error(why);
    const uint64_t seed = from_environment("CONVKERNELS_SIMT_SEED", 0);
    if (!mine) mine = std::make_unique<Engine>();
    engine = mine.get();
    engine->launch = &launch;
    engine->failure.clear();
    engine->shared.begin_launch(launch.shared_bytes, shared_memory_limit());
    engine->prepare(launch.block.x * launch.block.y * launch.block.z);
    blockDim = launch.block;
    gridDim = launch.grid;
    engine->tally = counting ? std::make_unique<Tally>() : nullptr;
    engine->run_grid(seed);
    status = engine->failure;
    if (engine->tally && status.empty()) {
      engine->tally->end_launch();
      const std::lock_guard lock(counted_mutex);
      counted.push_back({launch.kernel, launch.block, engine->tally->counts, std::move(engine->tally->instructions)});
    }
  } catch (const std::exception& error) {
    status = std::string("simt: ") + error.what();
  }
  return status.empty() ? nullptr : status.c_str();
}

void fail(const std::string& what) { throw std::runtime_error(what); }

void warp_wait(const Collective& what, unsigned mask, void* operand) {
  Engine& e = *engine;
  Thread& self = *current;
  Warp& warp = e.warps[self.id / kWarp];
  const unsigned bit = 1u << (self.id % kWarp);
  if ((mask & bit) == 0) fail(std::string(what.name) + ": the mask does not name the calling lane");
  if ((mask & ~warp.lanes) != 0) fail(std::string(what.name) + ": the mask names lanes that the block does not have");
  self.waits = &what;
  self.mask = mask;
  self.operand = operand;
  unsigned i = 0;
  while (i < warp.gatherings && (warp.gathering[i].what != &what || warp.gathering[i].mask != mask)) ++i;
  if (i == warp.gatherings) warp.gathering[warp.gatherings++] = {&what, mask, 0};
  warp.gathering[i].arrived |= bit;
  if (warp.gathering[i].arrived == mask) {
    warp.gathering[i] = warp.gathering[--warp.gatherings];
    void* operands[kWarp] = {};
    for (unsigned left = mask; left != 0; left &= left - 1) {
      const unsigned l = static_cast<unsigned>(__builtin_ctz(left));
      Thread& thread = *e.threads[self.id / kWarp * kWarp + l];
      operands[l] = thread.operand;
      thread.waits = nullptr;
    }
    if (what.finish != nullptr) what.finish(operands, mask);
    if (e.tally) {
      e.tally->count(what.kind);
      if (mask == warp.lanes) e.tally->meet(self.id / kWarp);
    }
    warp.ready |= mask;
  }
  e.suspend();
}

int block_wait(const Collective& what, bool predicate) {
  current->waits = &what;
  current->mask = 0;
  current->operand = &predicate;
  engine->suspend();
  return engine->barrier_count;
}

unsigned lane() { return current->id % kWarp; }

char* dynamic_shared() { return engine->shared.dynamic(); }

void* static_shared(const void* site, size_t bytes, size_t alignment) {
  return engine->shared.array(site, bytes, alignment);
}

void check_aligned(const char* what, const void* pointer, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    fail(std::string(what) + ": an address is not a multiple of " + std::to_string(alignment) + " bytes");
}

void check_shared(const char* what, const void* pointer, size_t bytes) {
  if (!engine->shared.holds(pointer, bytes)) fail(std::string(what) + ": an address is not in shared memory");
}

namespace {

void count_in_tally(Access access, const void* pointer, size_t bytes, const void* instruction) {
  const Thread& self = *current;
  // Places are told apart by the calls that led to them too.
  const uint64_t place = self.path.back() + reinterpret_cast<uintptr_t>(instruction);
  engine->tally->add(self.id / kWarp, self.id % kWarp, access, instruction, place, pointer,
                     static_cast<unsigned>(bytes));
}

bool lies_in(const void* pointer, const void* begin, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(begin) < bytes;
}

}  // namespace

void count_access(bool write, const void* pointer, size_t bytes, const void* instruction) {
  if (current == nullptr || !engine->tally) return;
  // Local memory, parameters and built-in variables.
  const Launch& launch = *engine->launch;
  if (current->fiber.holds(pointer) || lies_in(pointer, launch.arguments, launch.argument_bytes) ||
      lies_in(pointer, &threadIdx, sizeof threadIdx) || lies_in(pointer, &blockIdx, sizeof blockIdx) ||
      lies_in(pointer, &blockDim, sizeof blockDim) || lies_in(pointer, &gridDim, sizeof gridDim))
    return;
  if (engine->shared.holds(pointer, bytes))
    count_in_tally(write ? Access::kSharedStore : Access::kSharedLoad, pointer, bytes, instruction);
  else
    count_in_tally(write ? Access::kStore : Access::kLoad, pointer, bytes, instruction);
}

void count_matrix_load(const void* pointer, const void* instruction) {
  if (engine->tally) count_in_tally(Access::kMatrixLoad, pointer, 16, instruction);
}

void enter_function(const void* caller) {
  if (current == nullptr || !engine->tally) return;
  const uint64_t from = current->path.back() + reinterpret_cast<uintptr_t>(caller);
  current->path.push_back(from * 0x9E3779B97F4A7C15u);
}

void leave_function() {
  if (current != nullptr && engine->tally) current->path.pop_back();
}

void start_counting() {
  const std::lock_guard lock(counted_mutex);
  counted.clear();
  counting = true;
}

std::vector<Counted> stop_counting() {
  const std::lock_guard lock(counted_mutex);
  counting = false;
  return std::exchange(counted, {});
}

void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  check_aligned("cp.async, destination", to, bytes);
  check_aligned("cp.async, source", from, bytes);
  check_shared("cp.async, destination", to, bytes);
  Copy copy{static_cast<char*>(to), {}, static_cast<unsigned>(bytes), current->group};
  if (valid) std::memcpy(copy.data, from, bytes);
  if (engine->tally) {
    const void* const instruction = __builtin_return_address(0);
    if (valid) count_in_tally(Access::kCopyRead, from, bytes, instruction);
    count_in_tally(Access::kCopyWrite, to, bytes, instruction);
  }
  std::memset(to, 0xFF, bytes);
  current->copies.push_back(copy);
}

void copy_commit() { ++current->group; }

void copy_wait(unsigned newest) {
  Thread& self = *current;
  size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group + newest < self.group; ++done)
    std::memcpy(self.copies[done].to, self.copies[done].data, self.copies[done].bytes);
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace ck::simt
