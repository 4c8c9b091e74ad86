#include "csrc/simt/block.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "csrc/simt/engine.h"

namespace ck::simt {
namespace {

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
uint64_t architecture() { return from_environment("CONVKERNELS_SIMT_ARCH", 90); }
size_t shared_memory_limit() { return from_environment("CONVKERNELS_SIMT_SHARED", 227 * 1024); }
// One, so that blocks walk far, as they do in problems of real size.
uint64_t multiprocessors() { return from_environment("CONVKERNELS_SIMT_PROCESSORS", 1); }

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
    engine->architecture = architecture();
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
      e.tally->count(what.kind, what.units);
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

void count_bulk(Access access, const void* pointer, size_t bytes, const void* instruction) {
  if (engine->tally) engine->tally->add_bulk(access, instruction, pointer, static_cast<unsigned>(bytes));
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
