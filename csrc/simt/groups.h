// Named barriers, and how many registers the threads of a warpgroup have.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ck::simt {

struct NamedBarrier {
  unsigned threads = 0, arrived = 0;  // of the current phase
  unsigned phase = 0;
};

// Of a block.
struct Groups {
  NamedBarrier barriers[16];
  std::vector<unsigned> registers;  // of each warp, 0 before it asked for some

  void begin_block(size_t warps);
  // Fails if a barrier waits for threads, or the threads have more registers than there are.
  void end_block() const;
  // The barriers that wait for threads.
  std::string describe() const;
};

// Fails unless the GPU that is simulated has compute capability 9.0.
void require_warpgroups(const char* what);

// What follows is called by kernels. Whole warps come to a barrier; it opens for those that wait when `threads` have.
void barrier_sync(int barrier, int threads);
void barrier_arrive(int barrier, int threads);

// take: setmaxnreg.inc, otherwise setmaxnreg.dec.
void set_registers(int registers, bool take);

}  // namespace ck::simt
