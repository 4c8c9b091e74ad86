#include "csrc/simt/counters.h"

#include <algorithm>
#include <bit>

namespace ck::simt {
namespace {

constexpr unsigned kWarp = 32;
constexpr uintptr_t kSector = 32;

}  // namespace

Requests& Requests::operator+=(const Requests& other) {
  requests += other.requests;
  bytes += other.bytes;
  sectors += other.sectors;
  wavefronts += other.wavefronts;
  conflicts += other.conflicts;
  return *this;
}

void Tally::begin_block(unsigned warps) {
  ++counts.blocks;
  entries_.resize(warps * kWarp);
}

void Tally::add(unsigned warp, unsigned lane, Access access, const void* instruction, uint64_t place,
                const void* pointer, unsigned bytes) {
  entries_[warp * kWarp + lane].push_back(
      {instruction, place, reinterpret_cast<uintptr_t>(pointer), static_cast<uint8_t>(bytes), access});
}

void Tally::meet(unsigned warp) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    auto& entries = entries_[warp * kWarp + lane];
    for (const Entry& entry : entries) {
      // One place can be a load of shared memory for one call and of global memory for another.
      Place& place =
          places_[entry.place * 0x9E3779B97F4A7C15u + static_cast<unsigned>(entry.access) * kWarp + entry.bytes];
      if (place.requests.empty()) visited_.push_back(&place);
      const unsigned time = place.times[lane]++;
      if (time >= place.requests.size()) place.requests.emplace_back();
      Request& request = place.requests[time];
      request.instruction = entry.instruction;
      request.bytes = entry.bytes;
      request.access = entry.access;
      request.lane[request.lanes] = static_cast<uint8_t>(lane);
      request.address[request.lanes++] = entry.address;
    }
    entries.clear();
  }
  for (Place* place : visited_) {
    for (const Request& request : place->requests) count(request);
    place->requests.clear();
    std::fill_n(place->times, kWarp, 0u);
  }
  visited_.clear();
}

void Tally::count(const Request& request) {
  Requests one{1, uint64_t{request.bytes} * request.lanes, 0, 0, 0};
  if (is_global(request.access))
    one.sectors = sectors(request);
  else
    count_wavefronts(request, one);
  counts.accesses[static_cast<unsigned>(request.access)] += one;
  instructions[{request.instruction, request.access}] += one;
}

void Tally::touch(Access access, uintptr_t sector, uintptr_t first, uintptr_t end) {
  const uintptr_t from = std::max(first, sector * kSector), bytes = std::min(end, (sector + 1) * kSector) - from;
  touched_[sector] |= ((uint64_t{1} << bytes) - 1) << from % kSector << (access == Access::kStore ? 32 : 0);
}

void Tally::add_bulk(Access access, const void* instruction, const void* pointer, unsigned bytes) {
  Requests one{1, bytes, 0, 0, 0};
  const auto first = reinterpret_cast<uintptr_t>(pointer), end = first + bytes;
  if (is_global(access)) {
    one.sectors = (end + kSector - 1) / kSector - first / kSector;
    for (uintptr_t sector = first / kSector; sector * kSector < end; ++sector) touch(access, sector, first, end);
  } else {
    one.wavefronts = (bytes + 127) / 128;  // all banks at a time
  }
  counts.accesses[static_cast<unsigned>(access)] += one;
  instructions[{instruction, access}] += one;
}

uint64_t Tally::sectors(const Request& request) {
  uintptr_t touched[2 * kWarp];
  unsigned n = 0;
  for (unsigned i = 0; i < request.lanes; ++i) {
    const uintptr_t first = request.address[i], end = first + request.bytes;
    for (uintptr_t sector = first / kSector; sector * kSector < end; ++sector) {
      touch(request.access, sector, first, end);
      if (n == 0 || touched[n - 1] != sector) touched[n++] = sector;
    }
  }
  std::sort(touched, touched + n);
  return static_cast<uint64_t>(std::unique(touched, touched + n) - touched);
}

// Whether each pair of lanes, `apart` from each other, has one address, or one of them none.
bool Tally::lanes_agree(const Request& request, unsigned apart) {
  uintptr_t address[kWarp] = {};
  for (unsigned i = 0; i < request.lanes; ++i) address[request.lane[i]] = request.address[i];
  for (unsigned i = 0; i < kWarp; ++i) {
    const uintptr_t a = address[i], b = address[i ^ apart];
    if (a != b && a != 0 && b != 0) return false;
  }
  return true;
}

void Tally::count_wavefronts(const Request& request, Requests& into) {
  unsigned lanes = request.bytes > 8 ? 8 : request.bytes > 4 ? 16 : kWarp;
  if (lanes < kWarp && (lanes_agree(request, 1) || lanes_agree(request, 2))) lanes *= 2;
  for (unsigned i = 0; i < request.lanes;) {
    const unsigned phase = request.lane[i] / lanes;
    uintptr_t words[3 * kWarp];  // one more for each lane that begins within a word
    unsigned n = 0;
    for (; i < request.lanes && request.lane[i] / lanes == phase; ++i)
      for (uintptr_t word = request.address[i] / 4; word * 4 < request.address[i] + request.bytes; ++word)
        words[n++] = word;
    std::sort(words, words + n);
    n = static_cast<unsigned>(std::unique(words, words + n) - words);
    unsigned of_bank[32] = {}, most = 0;
    for (unsigned w = 0; w < n; ++w) most = std::max(most, ++of_bank[words[w] % 32]);
    into.wavefronts += most;
    into.conflicts += most - 1;
  }
}

void Tally::end_launch() {
  for (const auto& [sector, bytes] : touched_) {
    counts.bytes_read += static_cast<unsigned>(std::popcount(static_cast<uint32_t>(bytes)));
    counts.bytes_written += static_cast<unsigned>(std::popcount(bytes >> 32));
  }
}

}  // namespace ck::simt
