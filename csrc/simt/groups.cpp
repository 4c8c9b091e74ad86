#include "csrc/simt/groups.h"

#include <algorithm>

#include "csrc/simt/block.h"
#include "csrc/simt/engine.h"
#include "csrc/simt/lanes.h"

namespace ck::simt {
namespace {

constexpr unsigned kBarriers = 16, kRegisters = 65536;
constexpr unsigned kWarpgroup = 4;

struct Arrival {
  unsigned barrier, threads;
  unsigned phase = 0;  // the one that it belongs to
  bool operator==(const Arrival&) const = default;
};

void open(unsigned barrier) {
  Engine& e = *engine;
  NamedBarrier& one = e.groups.barriers[barrier];
  ++one.phase;
  one.arrived = 0;
  for (unsigned i = 0; i < e.count; ++i) {
    Thread& t = *e.threads[i];
    if (t.barrier != barrier) continue;
    t.barrier = 0;
    t.waits = nullptr;
    e.warps[i / kWarp].ready |= 1u << i % kWarp;
  }
}

void finish_arrival(void* const* operands, unsigned lanes) {
  const auto [barrier, threads, unused] = agreed<Arrival>("barrier", operands, lanes);
  NamedBarrier& one = engine->groups.barriers[barrier];
  if (one.arrived != 0 && one.threads != threads)
    fail("barrier " + std::to_string(barrier) + ": expected " + std::to_string(one.threads) +
         " threads, as those that came before, got " + std::to_string(threads));
  for_each_lane<Arrival>(operands, lanes, [&](int, Arrival& own) { own.phase = one.phase; });
  one.threads = threads;
  one.arrived += kWarp;
  if (one.arrived == threads) open(barrier);
}

constexpr Collective kSync{"barrier.sync", finish_arrival, Meeting::kWarpBarrier};
constexpr Collective kArrive{"barrier.arrive", finish_arrival, Meeting::kWarpBarrier};

unsigned own_warp() { return current->id / kWarp; }

// The phase of which the calling thread has arrived.
unsigned arrive(const Collective& what, int barrier, int threads) {
  Engine& e = *engine;
  if (barrier < 1 || barrier >= static_cast<int>(kBarriers))
    fail(std::string(what.name) + ": expected barriers 1 to 15, got " + std::to_string(barrier));
  const int most = static_cast<int>(e.warps.size() * kWarp);
  if (threads < 1 || threads % static_cast<int>(kWarp) != 0 || threads > most)
    fail(std::string(what.name) + ": expected a multiple of 32 threads, up to the " + std::to_string(most) +
         " of the block, got " + std::to_string(threads));
  Arrival arrival{static_cast<unsigned>(barrier), static_cast<unsigned>(threads)};
  warp_wait(what, e.warps[own_warp()].lanes, &arrival);
  return arrival.phase;
}

template <bool take>
void finish_registers(void* const* operands, unsigned lanes) {
  engine->groups.registers[own_warp()] = agreed<unsigned>(take ? "setmaxnreg.inc" : "setmaxnreg.dec", operands, lanes);
}

constexpr Collective kTake{"setmaxnreg.inc", finish_registers<true>, Meeting::kWarpBarrier, 0};
constexpr Collective kGive{"setmaxnreg.dec", finish_registers<false>, Meeting::kWarpBarrier, 0};

}  // namespace

void Groups::begin_block(size_t warps) {
  for (NamedBarrier& one : barriers) one = {};
  registers.assign(warps, 0);
}

void Groups::end_block() const {
  for (unsigned i = 0; i < kBarriers; ++i)
    if (barriers[i].arrived != 0)
      fail("barrier " + std::to_string(i) + ": the block ended when " + std::to_string(barriers[i].arrived) + " of " +
           std::to_string(barriers[i].threads) + " threads had come");
  // As many as a block can have from the start, where the processor runs one at a time.
  const unsigned at_first = kRegisters / (static_cast<unsigned>(registers.size()) * kWarp) / 8 * 8;
  unsigned total = 0;
  for (unsigned w = 0; w < registers.size(); ++w) {
    if (registers[w] != registers[w / kWarpgroup * kWarpgroup])
      fail("setmaxnreg: expected the same registers for all warps of a warpgroup, got " +
           std::to_string(registers[w / kWarpgroup * kWarpgroup]) + " and " + std::to_string(registers[w]));
    total += kWarp * (registers[w] != 0 ? registers[w] : at_first);
  }
  const bool asked = std::any_of(registers.begin(), registers.end(), [](unsigned r) { return r != 0; });
  if (asked && total > kRegisters)
    fail("setmaxnreg: the threads of the block have " + std::to_string(total) + " registers, of " +
         std::to_string(kRegisters));
}

std::string Groups::describe() const {
  std::string text;
  for (unsigned i = 0; i < kBarriers; ++i)
    if (barriers[i].arrived != 0)
      text += "; barrier " + std::to_string(i) + ": " + std::to_string(barriers[i].arrived) + " of " +
              std::to_string(barriers[i].threads) + " threads";
  return text;
}

void require_warpgroups(const char* what) {
  if (engine->architecture != 90)
    fail(std::string(what) + " exists only on compute capability 9.0, and the simulated GPU is sm_" +
         std::to_string(engine->architecture));
}

void barrier_sync(int barrier, int threads) {
  const unsigned phase = arrive(kSync, barrier, threads);
  if (engine->groups.barriers[barrier].phase != phase) return;
  current->waits = &kSync;
  current->mask = 0;
  current->operand = nullptr;
  current->barrier = static_cast<unsigned>(barrier);
  engine->suspend();
}

void barrier_arrive(int barrier, int threads) { arrive(kArrive, barrier, threads); }

void set_registers(int registers, bool take) {
  const Collective& what = take ? kTake : kGive;
  require_warpgroups(what.name);
  if (registers < 24 || registers > 256 || registers % 8 != 0)
    fail(std::string(what.name) + ": expected a multiple of 8 from 24 to 256, got " + std::to_string(registers));
  auto operand = static_cast<unsigned>(registers);
  warp_wait(what, ~0u, &operand);
}

}  // namespace ck::simt
