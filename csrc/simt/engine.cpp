#include "csrc/simt/engine.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace ck::simt {

constinit thread_local Engine* engine = nullptr;
constinit thread_local Thread* current = nullptr;

void Engine::leave(Fiber& from) {
  if (next == end || !failure.empty()) {
    from.switch_to(scheduler);
    return;
  }
  Thread& thread = *queue[next++];
  current = &thread;
  threadIdx = thread.index;
  from.switch_to(thread.fiber);
}

void Engine::suspend() {
  leave(current->fiber);
  if (stopping) throw Stop{};
}

void Engine::report(const std::string& what) {
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

void Engine::body() {
  for (;;) {
    Engine& self = *engine;
    current->state = Thread::kStarted;
    try {
      self.launch->call(self.launch->arguments);
      end_bulk_stores();
      end_products();
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

void Engine::step(Warp& warp, unsigned first_thread) {
  next = end = 0;
  for (unsigned left = warp.ready; left != 0; left &= left - 1)
    queue[end++] = threads[first_thread + static_cast<unsigned>(__builtin_ctz(left))].get();
  warp.ready = 0;
  random.shuffle(queue, end);
  leave(scheduler);
  current = nullptr;
}

bool Engine::go_on() {
  const Thread& some = *threads[0];
  unsigned same = 0, exited = 0;
  int predicates = 0;
  for (unsigned i = 0; i < count; ++i) {
    const Thread& t = *threads[i];
    exited += t.state == Thread::kExited;
    if (t.waits == nullptr || t.waits != some.waits || t.mask != 0 || t.operand == nullptr) continue;
    ++same;
    predicates += *static_cast<const bool*>(t.operand);
  }
  try {
    if (exited == count) {
      async.end_block();
      groups.end_block();
    } else if (same == count) {
      open_barrier(predicates);
    } else if (!advance()) {
      fail(describe(exited));
    }
  } catch (const std::exception& error) {
    report(error.what());
  }
  return exited != count && failure.empty();
}

bool Engine::advance() {
  const bool late = std::any_of(products.begin(), products.end(), [](const WarpProducts& w) { return w.late; });
  if (late && random.below(2) == 0) return advance_products();
  return async.advance() || advance_products();
}

void Engine::open_barrier(int predicates) {
  barrier_count = predicates;
  if (tally) {
    tally->count(Meeting::kBarrier);
    meet_all();
  }
  for (unsigned i = 0; i < count; ++i) threads[i]->waits = nullptr;
  for (Warp& warp : warps) warp.ready = warp.lanes;
  random.shuffle(order.data(), static_cast<unsigned>(order.size()));
}

void Engine::meet_all() {
  for (unsigned w = 0; w < warps.size(); ++w) tally->meet(w);
}

std::string Engine::describe(unsigned exited) const {
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
  return text + ", " + std::to_string(exited) + (exited == 1 ? " has exited" : " have exited") + async.describe() +
         groups.describe();
}

void Engine::prepare(unsigned threads_in_block) {
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

void Engine::run_block() {
  shared.begin_block();
  async.begin_block();
  groups.begin_block(warps.size());
  products.assign(warps.size(), {});
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads[i];
    t.state = Thread::kFresh;
    t.waits = nullptr;
    t.mbarrier = nullptr;
    t.barrier = 0;
    t.copies.clear();
    t.group = 0;
    t.stores.clear();
    t.bulk_group = 0;
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
    // A warp may have let one go on that had its turn before.
  } while (std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.ready != 0; }) || go_on());
  if (!failure.empty()) return unwind();
  if (tally) meet_all();
}

void Engine::unwind() {
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

void Engine::run_grid(uint64_t seed) {
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

}  // namespace ck::simt
