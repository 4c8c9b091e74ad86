#include "csrc/simt/products.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <string>
#include <utility>

#include "csrc/simt/block.h"
#include "csrc/simt/bulk.h"
#include "csrc/simt/engine.h"
#include "csrc/simt/lanes.h"

namespace ck::simt {
namespace {

constexpr const char* kName = "wgmma.mma_async";
constexpr unsigned kAll = ~0u;
constexpr unsigned kRows = 16;      // of a warp
constexpr unsigned kSummed = 16;    // numbers that a sum is of
constexpr unsigned kPiece = 8;      // numbers of 16 bytes
constexpr unsigned kWarpgroup = 4;  // warps

// An operand in shared memory.
struct Operand {
  unsigned start, leading, stride;
  bool other;

  Operand(const char* which, uint64_t descriptor, bool other)
      : start(field(descriptor, 0)), leading(field(descriptor, 16)), stride(field(descriptor, 32)), other(other) {
    // Rows of 128 bytes in groups of 8 that are swizzled, which begin at multiples of 1024 bytes.
    const unsigned within = start % 1024;
    if (other ? within != 0 : within >= 128 || within % 32 != 0)
      fail(std::string(kName) + ", " + which + ": an operand cannot begin at byte " + std::to_string(start) +
           " of dynamic shared memory");
  }

  static unsigned field(uint64_t descriptor, int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3FFF) << 4; }

  // Of the 8 numbers from row or column `i` and summed number k on, which lie side by side.
  const char* piece(unsigned i, unsigned k) const {
    const unsigned at = other ? start + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2
                              : start + i / 8 * stride + i % 8 * 128 + k * 2;
    return dynamic_shared() + (at ^ (at >> 7 & 7) << 4);
  }

  // body(i, k, piece) for all pieces of `count` rows or columns from `first` on.
  template <class Body>
  void for_each_piece(unsigned first, unsigned count, Body body) const {
    for (unsigned i = 0; i < count; i += other ? kPiece : 1)
      for (unsigned k = 0; k < kSummed; k += other ? 1 : kPiece) body(i, k, piece(first + i, k));
  }
};

Operand operand_a(const Factors& factors) { return {"a", factors.a, factors.a_other}; }
Operand operand_b(const Factors& factors) { return {"b", factors.b, factors.b_other}; }
unsigned first_row(unsigned warp) { return warp % kWarpgroup * kRows; }

// What the async proxy sees of an operand.
std::vector<uint16_t> read(const char* which, const Operand& operand, unsigned first, unsigned count) {
  std::vector<uint16_t> numbers(size_t{count} * kSummed);
  uint16_t* to = numbers.data();
  const std::string name = std::string(kName) + ", " + which;
  if (operand.other && first + count > 64 && operand.leading % 1024 != 0)
    fail(name + ": expected panels that are a multiple of 1024 bytes apart, got " + std::to_string(operand.leading));
  operand.for_each_piece(first, count, [&](unsigned, unsigned, const char* piece) {
    check_shared(name.c_str(), piece, 16);
    check_fenced(name.c_str(), piece, 16);
    std::memcpy(to, piece, 16);
    to += kPiece;
  });
  return numbers;
}

// Fails if an operand is no longer what it was, except where a copy has come that nobody had waited for.
void check_same(const std::vector<uint16_t>& numbers, const Operand& operand, unsigned first, unsigned count) {
  const uint16_t* was = numbers.data();
  operand.for_each_piece(first, count, [&](unsigned, unsigned, const char* piece) {
    if (std::memcmp(was, piece, 16) != 0 && !std::all_of(was, was + kPiece, [](uint16_t x) { return x == 0xFFFF; })) {
      const char* const found = std::mismatch(piece, piece + 16, reinterpret_cast<const char*>(was)).first;
      fail("wgmma: " + engine->shared.place(found) + " was written before wgmma.wait_group");
    }
    was += kPiece;
  });
}

// to: [i][k] with steps of `step_i` and `step_k`.
template <float (*value)(uint32_t)>
void decode(const std::vector<uint16_t>& numbers, const Operand& operand, unsigned count, float* to, unsigned step_i,
            unsigned step_k) {
  const uint16_t* from = numbers.data();
  const unsigned step = operand.other ? step_i : step_k;
  operand.for_each_piece(0, count, [&](unsigned i, unsigned k, const char*) {
    float* const piece = to + i * step_i + k * step_k;
    for (unsigned j = 0; j < kPiece; ++j) piece[j * step] = value(from[j]);
    from += kPiece;
  });
}

template <unsigned columns, float (*value)(uint32_t)>
void multiply(const Product& product, Sums& sums) {
  const Factors& factors = product.factors;
  float a[kRows][kSummed], b[kSummed][columns];
  if (factors.a_in_registers) {
    for (unsigned m = 0; m < kRows; ++m)
      for (unsigned k = 0; k < kSummed; ++k) a[m][k] = value(product.a[m * kSummed + k]);
  } else {
    const Operand in_shared = operand_a(factors);
    check_same(product.a, in_shared, first_row(product.warp), kRows);
    decode<value>(product.a, in_shared, kRows, a[0], kSummed, 1);
  }
  const Operand in_shared = operand_b(factors);
  check_same(product.b, in_shared, 0, columns);
  decode<value>(product.b, in_shared, columns, b[0], 1, columns);
  if (!factors.add) std::fill(sums.values.begin(), sums.values.end(), 0.0f);
  for (unsigned m = 0; m < kRows; ++m) {
    float* const d = &sums.values[m * columns];
    for (unsigned k = 0; k < kSummed; ++k)
      for (unsigned n = 0; n < columns; ++n) d[n] += a[m][k] * b[k][n];
  }
}

// body(a lane's number, the number in [16][columns]).
template <class Body>
void for_each_sum(Sums& sums, Body body) {
  for (unsigned lane = 0; lane < kWarp; ++lane)
    for (unsigned n = 0; n < sums.columns / 8; ++n)
      for (unsigned e = 0; e < 4; ++e)
        body(sums.lanes[lane][n * 4 + e],
             sums.values[(lane / 4 + e / 2 * 8) * sums.columns + n * 8 + lane % 4 * 2 + e % 2]);
}

struct Lane {
  float* d;
  const uint32_t* registers;
  Factors factors;
  const void* instruction;
  bool operator==(const Lane& other) const { return factors == other.factors; }
};

// The sums at d of all lanes, NaN for the kernel from now on.
Sums& take_sums(WarpProducts& own, void* const* operands, unsigned columns, bool add) {
  float* const first = static_cast<const Lane*>(operands[0])->d;
  for (Sums& sums : own.sums) {
    if (sums.lanes[0] == first && sums.columns == columns) return sums;
    if (std::less<>()(first, sums.lanes[0] + sums.columns / 2) && std::less<>()(sums.lanes[0], first + columns / 2))
      fail(std::string(kName) + ": some of the sums belong to a product of another shape that is not done");
  }
  Sums& sums = own.sums.emplace_back();
  sums.columns = columns;
  sums.products = 0;
  sums.values.resize(size_t{kRows} * columns);
  for_each_lane<const Lane>(operands, kAll, [&](int lane, const Lane& one) { sums.lanes[lane] = one.d; });
  for_each_sum(sums, [&](float& of_lane, float& value) {
    if (add) value = of_lane;
    std::memset(&of_lane, 0xFF, sizeof of_lane);
  });
  return sums;
}

std::vector<uint16_t> from_registers(void* const* operands) {
  std::vector<uint16_t> a(size_t{kRows} * kSummed);
  for_each_lane<const Lane>(operands, kAll, [&](int lane, const Lane& one) {
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half)
        a[static_cast<size_t>((lane / 4 + r % 2 * 8) * 16 + lane % 4 * 2 + half + r / 2 * 8)] =
            static_cast<uint16_t>(one.registers[r] >> 16 * half);
  });
  return a;
}

WarpProducts& own_products() { return engine->products[current->id / kWarp]; }

template <unsigned columns, float (*value)(uint32_t)>
void begin(void* const* operands, unsigned lanes) {
  const auto& [d, registers, factors, instruction] = agreed<Lane>(kName, operands, lanes);
  WarpProducts& own = own_products();
  const unsigned warp = current->id / kWarp;
  if (!own.fenced)
    fail(std::string(kName) + " without wgmma.fence since the last wgmma.commit_group or wgmma.wait_group");
  Product product{factors, warp, own.group, d, {}, {}, multiply<columns, value>};
  if (factors.a_in_registers) {
    product.a = from_registers(operands);
  } else {
    const Operand a = operand_a(factors);
    product.a = read("a", a, first_row(warp), kRows);
    count_bulk(Access::kOperandRead, a.piece(first_row(warp), 0), kRows * kSummed * 2, instruction);
  }
  const Operand b = operand_b(factors);
  product.b = read("b", b, 0, columns);
  if (warp % kWarpgroup == 0)
    count_bulk(Access::kOperandRead, b.piece(0, 0), size_t{columns} * kSummed * 2, instruction);
  ++take_sums(own, operands, columns, factors.add).products;
  own.products.push_back(std::move(product));
}

void finish_fence(void* const*, unsigned) { own_products().fenced = true; }

void finish_commit(void* const*, unsigned) {
  WarpProducts& own = own_products();
  ++own.group;
  own.fenced = false;
}

void end(const Product& product, WarpProducts& own) {
  const auto sums =
      std::find_if(own.sums.begin(), own.sums.end(), [&](const Sums& s) { return s.lanes[0] == product.sums; });
  product.finish(product, *sums);
  if (--sums->products != 0) return;
  for_each_sum(*sums, [](float& of_lane, float value) {
    if (std::bit_cast<uint32_t>(of_lane) != ~0u) fail("wgmma: a sum was written before wgmma.wait_group");
    of_lane = value;
  });
  own.sums.erase(sums);
}

void end_groups(WarpProducts& own) {
  auto done = own.products.begin();
  for (; done != own.products.end() && done->group + own.newest < own.group; ++done) end(*done, own);
  own.products.erase(own.products.begin(), done);
}

void finish_wait(void* const* operands, unsigned lanes) {
  const unsigned newest = agreed<unsigned>("wgmma.wait_group", operands, lanes);
  WarpProducts& own = own_products();
  own.fenced = false;
  if (newest == 0 && !own.products.empty() && own.products.back().group == own.group)
    fail("wgmma.wait_group: no wgmma.commit_group followed a product");
  own.newest = newest;
  own.late = !own.products.empty() && engine->random.below(2) == 0;
  if (!own.late) end_groups(own);
}

constexpr Collective kProducts[3][2] = {
    {{"wgmma.m64n32k16.f16", begin<32, from_f16>, Meeting::kWarpgroupProduct, 4},
     {"wgmma.m64n32k16.bf16", begin<32, from_bf16>, Meeting::kWarpgroupProduct, 4}},
    {{"wgmma.m64n64k16.f16", begin<64, from_f16>, Meeting::kWarpgroupProduct, 8},
     {"wgmma.m64n64k16.bf16", begin<64, from_bf16>, Meeting::kWarpgroupProduct, 8}},
    {{"wgmma.m64n128k16.f16", begin<128, from_f16>, Meeting::kWarpgroupProduct, 16},
     {"wgmma.m64n128k16.bf16", begin<128, from_bf16>, Meeting::kWarpgroupProduct, 16}}};
constexpr Collective kFence{"wgmma.fence", finish_fence, Meeting::kWarpBarrier, 0};
constexpr Collective kCommit{"wgmma.commit_group", finish_commit, Meeting::kWarpBarrier, 0};
constexpr Collective kWait{"wgmma.wait_group", finish_wait, Meeting::kWarpBarrier, 0};

}  // namespace

bool advance_products() {
  Engine& e = *engine;
  std::vector<unsigned> late;
  for (unsigned w = 0; w < e.products.size(); ++w)
    if (e.products[w].late) late.push_back(w);
  if (late.empty()) return false;
  const unsigned w = late[e.random.below(static_cast<unsigned>(late.size()))];
  e.products[w].late = false;
  end_groups(e.products[w]);
  for (unsigned lane = 0; lane < kWarp; ++lane) e.threads[w * kWarp + lane]->waits = nullptr;
  e.warps[w].ready = kAll;
  return true;
}

void multiply_warpgroup(unsigned columns, bool bf16, float* d, const uint32_t* registers, const Factors& factors) {
  require_warpgroups(kName);
  if (engine->count % (kWarpgroup * kWarp) != 0)
    fail(std::string(kName) + ": expected a block of whole warpgroups of 128 threads, got " +
         std::to_string(engine->count));
  Lane operand{d, registers, factors, __builtin_return_address(0)};
  warp_wait(kProducts[columns / 64][bf16], kAll, &operand);
}

void products_fence() { warp_wait(kFence, kAll, nullptr); }
void products_commit() { warp_wait(kCommit, kAll, nullptr); }

void products_wait(unsigned newest) {
  warp_wait(kWait, kAll, &newest);
  if (!own_products().late) return;
  current->waits = &kWait;
  current->mask = 0;
  current->operand = nullptr;
  engine->suspend();
}

void end_products() {
  if (!own_products().products.empty()) fail("wgmma: a thread ended before wgmma.wait_group for its products");
}

}  // namespace ck::simt
