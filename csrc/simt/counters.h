// What a launch asks of memory and of the units that the threads share.
//
// A request is what the lanes of a warp do by one instruction: the n-th time that each comes to a place in the program
// since all of them last met. A place is an address in the machine code and the calls that led to it. So it does not
// matter in which order threads run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "csrc/simt/types.h"

namespace ck::simt {

// Loads and stores, copies by cp.async from global to shared memory, and ldmatrix. A bulk copy is such a copy, or a
// load of shared memory and a store. Operands of the products of a warpgroup are read from shared memory: by each warp
// its own rows of the first, and by the first warp the second one for all four.
enum class Access : uint8_t {
  kLoad,
  kStore,
  kCopyRead,
  kSharedLoad,
  kSharedStore,
  kCopyWrite,
  kMatrixLoad,
  kOperandRead
};
inline constexpr unsigned kAccesses = 8;
inline constexpr bool is_global(Access access) { return access <= Access::kCopyRead; }

// What all threads of a block, or those of a warp, do together. A warpgroup's products count in each warp, as so many
// of the 16 x 8 x 16 that a kMatrixProduct is.
enum class Meeting : uint8_t {
  kBarrier,
  kWarpBarrier,
  kShuffle,
  kVote,
  kMatrixLoad,
  kMatrixProduct,
  kWarpgroupProduct
};
inline constexpr unsigned kMeetings = 7;

struct Requests {
  uint64_t requests, bytes;
  // In global memory: pieces of 32 bytes that requests touch.
  uint64_t sectors;
  // In shared memory: how often its 32 banks of 4 bytes are asked, and how much of that is beyond once per phase. A
  // phase is 8 lanes with 16 bytes each, 16 with 8, or all; twice as many where every two lanes that are 1 apart, or
  // every two that are 2 apart (lane ^ 1, lane ^ 2), ask for the same.
  uint64_t wavefronts, conflicts;

  Requests& operator+=(const Requests& other);
  bool operator==(const Requests&) const = default;
};

struct Counts {
  uint64_t blocks, meetings[kMeetings];
  Requests accesses[kAccesses];
  // Different bytes of global memory: the least that a launch can move to compute the same.
  uint64_t bytes_read, bytes_written;

  uint64_t of(Meeting meeting) const { return meetings[static_cast<unsigned>(meeting)]; }
  const Requests& of(Access access) const { return accesses[static_cast<unsigned>(access)]; }
  bool operator==(const Counts&) const = default;
};

// Gathers the accesses of the threads of a block into requests.
class Tally {
 public:
  using Instructions = std::map<std::pair<const void*, Access>, Requests>;

  Counts counts{};
  Instructions instructions;  // what each of them asks for

  void begin_block(unsigned warps);
  void count(Meeting meeting, unsigned units = 1) { counts.meetings[static_cast<unsigned>(meeting)] += units; }
  // At most 16 bytes.
  void add(unsigned warp, unsigned lane, Access access, const void* instruction, uint64_t place, const void* pointer,
           unsigned bytes);
  // A bulk copy, one request of its own.
  void add_bulk(Access access, const void* instruction, const void* pointer, unsigned bytes);
  // Called when the lanes of a warp have come together: their accesses since the last time become requests.
  void meet(unsigned warp);
  void end_launch();

 private:
  struct Entry {
    const void* instruction;
    uint64_t place;
    uintptr_t address;
    uint8_t bytes;
    Access access;
  };
  struct Request {
    const void* instruction;
    uint8_t bytes;
    Access access;
    uint8_t lanes = 0;
    uint8_t lane[32];
    uintptr_t address[32];
  };
  struct Place {
    unsigned times[32] = {};
    std::vector<Request> requests;
  };

  void count(const Request& request);
  uint64_t sectors(const Request& request);
  // Notes which bytes of a sector, those from `first` to `end`, are read, or written.
  void touch(Access access, uintptr_t sector, uintptr_t first, uintptr_t end);
  static bool lanes_agree(const Request& request, unsigned apart);
  static void count_wavefronts(const Request& request, Requests& into);

  std::vector<std::vector<Entry>> entries_;  // of each lane of each warp
  std::unordered_map<uint64_t, Place> places_;
  std::vector<Place*> visited_;
  // Which bytes of a sector have been read, and in the upper half, written.
  std::unordered_map<uintptr_t, uint64_t> touched_;
};

// A launch that was counted. kernel: the function, by which its name can be found.
struct Counted {
  const void* kernel;
  dim3 block;
  Counts counts;
  Tally::Instructions instructions;
};

// Counts the launches of all OS threads from now on; ends that, and returns those since.
void start_counting();
std::vector<Counted> stop_counting();

}  // namespace ck::simt
