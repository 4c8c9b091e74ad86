#include "csrc/simt/bulk.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "csrc/simt/block.h"
#include "csrc/simt/engine.h"

namespace ck::simt {
namespace {

constexpr Collective kTryWait{"mbarrier.try_wait", nullptr, Meeting::kBarrier};
constexpr unsigned kMost = (1u << 20) - 1;  // arrivals, and bytes
// What the memory of an mbarrier holds here.
constexpr uint64_t kOpaque = 0x6D62617272696572u;

bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
  return std::less<>()(a, b + b_bytes) && std::less<>()(b, a + a_bytes);
}

void check_copy(const char* what, const void* shared, const char* shared_end, const void* global,
                const char* global_end, size_t bytes) {
  const std::string name = what;
  check_aligned((name + ", " + shared_end).c_str(), shared, 16);
  check_aligned((name + ", " + global_end).c_str(), global, 16);
  if (bytes % 16 != 0) fail(name + ": the size must be a multiple of 16 bytes, got " + std::to_string(bytes));
  check_shared((name + ", " + shared_end).c_str(), shared, bytes);
  if (engine->shared.holds(global, 1)) fail(name + ", " + global_end + ": an address is in shared memory");
}

Mbarrier& find(const char* what, void* at) {
  check_aligned(what, at, sizeof kOpaque);
  check_shared(what, at, sizeof kOpaque);
  for (Mbarrier& one : engine->async.mbarriers) {
    if (one.at != at) continue;
    if (std::memcmp(at, &kOpaque, sizeof kOpaque) != 0)
      fail(std::string(what) + ": the mbarrier at " + engine->shared.place(at) + " was overwritten");
    return one;
  }
  fail(std::string(what) + ": there is no mbarrier at " + engine->shared.place(at));
}

// Ends the current phase if nothing is missing.
void complete(Mbarrier& one) {
  if (one.pending != 0 || one.expected != one.came) return;
  Engine& e = *engine;
  auto& loads = e.async.loads;
  for (const BulkLoad& load : loads) {
    if (!load.came || load.mbarrier != one.at) continue;
    if (!std::all_of(load.to, load.to + load.data.size(), [](char c) { return c == '\xff'; }))
      fail("cp.async.bulk, destination: " + e.shared.place(load.to) + " was written while the copy was on its way");
    std::copy(load.data.begin(), load.data.end(), load.to);
    std::copy(load.data.begin(), load.data.end(), e.shared.seen(load.to));
  }
  std::erase_if(loads, [&](const BulkLoad& load) { return load.came && load.mbarrier == one.at; });
  ++one.phase;
  one.pending = one.count;
  one.expected = one.came = 0;
  for (unsigned i = 0; i < e.count; ++i) {
    Thread& t = *e.threads[i];
    if (t.mbarrier != one.at) continue;
    t.mbarrier = nullptr;
    t.waits = nullptr;
    e.warps[i / kWarp].ready |= 1u << i % kWarp;
  }
}

}  // namespace

void check_fenced(const char* what, const char* shared, size_t bytes) {
  const char* const seen = engine->shared.seen(shared);
  if (std::memcmp(shared, seen, bytes) == 0) return;
  const char* const found = std::mismatch(shared, shared + bytes, seen).first;
  fail(std::string(what) + ": " + engine->shared.place(found) +
       " was written by a thread and no fence.proxy.async followed");
}

void AsyncProxy::begin_block() {
  mbarriers.clear();
  loads.clear();
}

bool AsyncProxy::advance() {
  std::vector<BulkLoad*> under_way;
  for (BulkLoad& load : loads)
    if (!load.came) under_way.push_back(&load);
  if (under_way.empty()) return false;
  BulkLoad& load = *under_way[engine->random.below(static_cast<unsigned>(under_way.size()))];
  load.came = true;
  Mbarrier& one = find("cp.async.bulk", load.mbarrier);
  one.came += load.data.size();
  complete(one);
  return true;
}

void AsyncProxy::end_block() const {
  if (!loads.empty())
    fail("cp.async.bulk: the block ended before the phase that counts the bytes of a copy to " +
         engine->shared.place(loads[0].to) + " was complete");
}

std::string AsyncProxy::describe() const {
  std::string text;
  for (const Mbarrier& one : mbarriers) {
    const bool wanted = std::any_of(engine->threads.begin(), engine->threads.begin() + engine->count,
                                    [&](const auto& thread) { return thread->mbarrier == one.at; });
    if (!wanted) continue;
    text += "; phase " + std::to_string(one.phase) + " of the mbarrier at " + engine->shared.place(one.at) + ": " +
            std::to_string(one.count - one.pending) + " of " + std::to_string(one.count) + " arrivals, " +
            std::to_string(one.came) + " of " + std::to_string(one.expected) + " bytes";
  }
  return text;
}

void mbarrier_init(void* mbarrier, unsigned count) {
  if (engine->architecture < 90)
    fail("mbarrier.init: the simulated GPU, sm_" + std::to_string(engine->architecture) +
         ", is older than bulk copies");
  check_aligned("mbarrier.init", mbarrier, sizeof kOpaque);
  check_shared("mbarrier.init", mbarrier, sizeof kOpaque);
  if (count < 1 || count > kMost)
    fail("mbarrier.init: expected 1 to " + std::to_string(kMost) + " arrivals, got " + std::to_string(count));
  char* const at = static_cast<char*>(mbarrier);
  auto& all = engine->async.mbarriers;
  if (std::any_of(all.begin(), all.end(), [&](const Mbarrier& one) { return one.at == at; }))
    fail("mbarrier.init: there already is an mbarrier at " + engine->shared.place(at));
  std::memcpy(at, &kOpaque, sizeof kOpaque);
  all.push_back({.at = at, .count = count, .pending = count, .maker = current->id});
}

void mbarrier_invalidate(void* mbarrier) {
  find("mbarrier.inval", mbarrier);
  for (const BulkLoad& load : engine->async.loads)
    if (load.mbarrier == mbarrier) fail("mbarrier.inval: a bulk copy that it counts is on its way");
  for (unsigned i = 0; i < engine->count; ++i)
    if (engine->threads[i]->mbarrier == mbarrier) fail("mbarrier.inval: a thread waits for it");
  std::erase_if(engine->async.mbarriers, [&](const Mbarrier& one) { return one.at == mbarrier; });
}

void mbarrier_arrive(void* mbarrier) {
  Mbarrier& one = find("mbarrier.arrive", mbarrier);
  if (one.pending == 0)
    fail("mbarrier.arrive: more than the " + std::to_string(one.count) + " arrivals of a phase at " +
         engine->shared.place(mbarrier));
  --one.pending;
  complete(one);
}

void mbarrier_expect(void* mbarrier, unsigned bytes) {
  Mbarrier& one = find("mbarrier.expect_tx", mbarrier);
  if (bytes > kMost || one.expected + bytes > kMost)
    fail("mbarrier.expect_tx: at most " + std::to_string(kMost) + " bytes");
  one.expected += bytes;
  complete(one);
}

bool mbarrier_try_wait(void* mbarrier, unsigned parity) {
  Engine& e = *engine;
  Thread& self = *current;
  const auto done = [&] { return find(kTryWait.name, mbarrier).phase % 2 != parity % 2; };
  if (done()) return true;
  if (e.random.below(4) == 0) {
    e.warps[self.id / kWarp].ready |= 1u << self.id % kWarp;
  } else {
    self.waits = &kTryWait;
    self.mask = 0;
    self.operand = nullptr;
    self.mbarrier = static_cast<char*>(mbarrier);
  }
  e.suspend();
  return done();
}

void fence_mbarrier_init() {
  for (Mbarrier& one : engine->async.mbarriers)
    if (one.maker == current->id) one.fenced = true;
}

void fence_proxy_async() {
  fence_mbarrier_init();
  engine->shared.publish();
}

void start_load(const char* what, void* to, std::vector<char> data, void* mbarrier) {
  const Mbarrier& one = find(what, mbarrier);
  if (!one.fenced)
    fail(std::string(what) +
         ": neither fence.mbarrier_init nor fence.proxy.async followed the initialisation of the mbarrier at " +
         engine->shared.place(mbarrier));
  char* const begin = static_cast<char*>(to);
  const size_t bytes = data.size();
  const std::string destination = std::string(what) + ", destination";
  for (const BulkLoad& load : engine->async.loads)
    if (overlap(load.to, load.data.size(), begin, bytes))
      fail(destination + ": another copy to " + engine->shared.place(begin) + " is on its way");
  check_fenced(destination.c_str(), begin, bytes);
  engine->async.loads.push_back({begin, one.at, std::move(data)});
  std::memset(begin, 0xFF, bytes);
  std::memset(engine->shared.seen(begin), 0xFF, bytes);
}

void bulk_load(void* to, const void* from, size_t bytes, void* mbarrier) {
  check_copy("cp.async.bulk", to, "destination", from, "source", bytes);
  const char* const source = static_cast<const char*>(from);
  start_load("cp.async.bulk", to, {source, source + bytes}, mbarrier);
  const void* const instruction = __builtin_return_address(0);
  count_bulk(Access::kCopyRead, from, bytes, instruction);
  count_bulk(Access::kCopyWrite, to, bytes, instruction);
}

void bulk_store(void* to, const void* from, size_t bytes) {
  check_copy("cp.async.bulk", from, "source", to, "destination", bytes);
  const char* const begin = static_cast<const char*>(from);
  check_fenced("cp.async.bulk, source", begin, bytes);
  current->stores.push_back({static_cast<char*>(to), begin, {begin, begin + bytes}, current->bulk_group});
  const void* const instruction = __builtin_return_address(0);
  count_bulk(Access::kSharedLoad, from, bytes, instruction);
  count_bulk(Access::kStore, to, bytes, instruction);
}

void bulk_commit() { ++current->bulk_group; }

void bulk_wait(unsigned newest, bool read) {
  Thread& self = *current;
  const auto waited_for = [&](const BulkStore& store) { return store.group + newest < self.bulk_group; };
  for (BulkStore& store : self.stores) {
    if (!waited_for(store)) continue;
    if (!store.read && !std::equal(store.data.begin(), store.data.end(), store.from))
      fail("cp.async.bulk, source: " + engine->shared.place(store.from) +
           " was written before cp.async.bulk.wait_group.read");
    store.read = true;
    if (!read) std::copy(store.data.begin(), store.data.end(), store.to);
  }
  if (!read) std::erase_if(self.stores, waited_for);
}

void end_bulk_stores() {
  for (const BulkStore& store : current->stores) {
    if (!store.read) fail("cp.async.bulk: a thread ended before what it stores had been read");
    std::copy(store.data.begin(), store.data.end(), store.to);
  }
  current->stores.clear();
}

}  // namespace ck::simt
