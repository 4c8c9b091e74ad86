#include "csrc/simt/tensor.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "csrc/simt/block.h"
#include "csrc/simt/bulk.h"
#include "csrc/simt/engine.h"

namespace ck::simt {
namespace {

constexpr const char* kName = "cp.async.bulk.tensor";
constexpr int kRow = 128;  // bytes
constexpr int kNumbers = 64;

}  // namespace

const char* make_tensor_map(TensorMap& map, const void* data, const int64_t (&size)[4], const int64_t (&stride)[3],
                            int box1) {
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0)
    return "the address of a tensor map must be a multiple of 16 bytes";
  for (int i = 0; i < 4; ++i)
    if (size[i] < 1 || size[i] > int64_t{1} << 32) return "the sizes of a tensor map must be 1 to 2^32";
  for (int i = 0; i < 3; ++i)
    if (stride[i] % 16 != 0 || stride[i] < 0 || stride[i] >= int64_t{1} << 40 || (stride[i] == 0 && size[i + 1] > 1))
      return "the strides of a tensor map must be multiples of 16 bytes, more than 0 and less than 2^40";
  if (box1 < 1 || box1 > 256) return "the box of a tensor map must have 1 to 256 rows";
  map = {static_cast<const char*>(data), {}, {}, box1};
  std::copy_n(size, 4, map.size);
  std::copy_n(stride, 3, map.stride);
  return nullptr;
}

void tensor_load(void* to, const TensorMap& map, const int (&at)[4], void* mbarrier) {
  const size_t bytes = size_t{kRow} * static_cast<size_t>(map.box1);
  const std::string destination = std::string(kName) + ", destination";
  check_shared(destination.c_str(), to, bytes);
  if ((static_cast<char*>(to) - dynamic_shared()) % 1024 != 0)
    fail(destination + ": " + engine->shared.place(to) + " is not a multiple of 1024 bytes");
  const void* const instruction = __builtin_return_address(0);
  std::vector<char> data(bytes);
  const auto inside = [&](int i, int64_t x) { return x >= 0 && x < map.size[i]; };
  const int64_t first = std::max(at[0], 0), end = std::min<int64_t>(int64_t{at[0]} + kNumbers, map.size[0]);
  for (int r = 0; r < map.box1 && inside(2, at[2]) && inside(3, at[3]); ++r) {
    const int64_t row = int64_t{at[1]} + r;
    if (!inside(1, row) || first >= end) continue;
    const char* const from = map.data + at[3] * map.stride[2] + at[2] * map.stride[1] + row * map.stride[0] + 2 * first;
    char numbers[kRow] = {};
    std::memcpy(numbers + 2 * (first - at[0]), from, static_cast<size_t>(2 * (end - first)));
    for (int piece = 0; piece < 8; ++piece)
      std::memcpy(&data[static_cast<size_t>(r * kRow + (piece ^ r % 8) * 16)], numbers + piece * 16, 16);
    count_bulk(Access::kCopyRead, from, static_cast<size_t>(2 * (end - first)), instruction);
  }
  start_load(kName, to, std::move(data), mbarrier);
  count_bulk(Access::kCopyWrite, to, bytes, instruction);
}

}  // namespace ck::simt
