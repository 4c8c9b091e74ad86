// Runs the threads of a CUDA grid on the CPU: one fiber per thread, one block after another on the calling OS thread. A
// thread runs until it waits. Who goes next is drawn from a generator seeded by CONVKERNELS_SIMT_SEED, anew after every
// wait, so that a kernel that leaves out a barrier computes something else than one that has it.
//
// Blocks are run in a shuffled order and each to its end: a block that waits for another one never returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "csrc/simt/counters.h"
#include "csrc/simt/types.h"

namespace ck::simt {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  std::source_location where;
  void (*call)(const void* arguments);
  const void* arguments;
  size_t argument_bytes;
  const void* kernel;
};

// Runs the grid. nullptr, or what went wrong first; the text is valid until this OS thread launches again.
const char* run(const Launch& launch);

// Bytes that a block may have: CONVKERNELS_SIMT_SHARED.
size_t shared_memory_limit();

// Of the GPU that is simulated, 10 times its compute capability: CONVKERNELS_SIMT_ARCH.
uint64_t architecture();

// What it has of them: CONVKERNELS_SIMT_PROCESSORS.
uint64_t multiprocessors();

// Everything below is called by kernels.

// Ends the launch with a status that names the launch, the block and the thread.
[[noreturn]] void fail(const std::string& what);

// Something that several threads do together. `finish` is called once all have arrived, with the operand of each lane
// in `lanes`; it may be missing.
struct Collective {
  const char* name;
  void (*finish)(void* const* operands, unsigned lanes);
  Meeting kind;
  unsigned units = 1;  // as which it counts
};

// Waits for the lanes of this warp in `mask` to arrive at the same collective with the same mask.
void warp_wait(const Collective& what, unsigned mask, void* operand);

// Waits for all threads of the block to arrive at the same collective. Returns for how many `predicate` holds.
int block_wait(const Collective& what, bool predicate);

unsigned lane();

char* dynamic_shared();

// The memory of the static array declared at `site`.
void* static_shared(const void* site, size_t bytes, size_t alignment);

void check_aligned(const char* what, const void* pointer, size_t alignment);
// Fails unless all the bytes are shared memory of this block.
void check_shared(const char* what, const void* pointer, size_t bytes);

// cp.async. The source is read at once. The destination holds 0xFF until the wait of this thread that covers the copy.
void copy_async(void* to, const void* from, size_t bytes, bool valid);
void copy_commit();
void copy_wait(unsigned newest);

// Counts an access of the calling thread to memory that it shares with others, if this launch is counted.
void count_access(bool write, const void* pointer, size_t bytes, const void* instruction);
// The same for a bulk copy, whose bytes lie side by side.
void count_bulk(Access access, const void* pointer, size_t bytes, const void* instruction);
// The same for ldmatrix, which reads 16 bytes of shared memory.
void count_matrix_load(const void* pointer, const void* instruction);
// The thread calls a function, or returns from it.
void enter_function(const void* caller);
void leave_function();

}  // namespace ck::simt
