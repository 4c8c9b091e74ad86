// Attention in bfloat16 on tiles: the same bits from every compilation of it, from any number of threads and as
// recorded; and close to the portable kernels, which the Python tests hold against the definition.
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "csrc/tests/check.h"
#include "csrc/tests/numbers.h"
#include "csrc/tests/tile_sets.h"

namespace {

using ck::bf16;
using ck::HeadRows;
using ck::Outside;
using ck::cpu::AttentionBackward;
using ck::cpu::AttentionForward;
using ck::cpu::AttentionProblem;
using ck::cpu::draw;
using ck::cpu::halves;
using ck::cpu::Kernels;
using ck::cpu::kernels_of;
using ck::cpu::serial;
using ck::cpu::sets_with_tiles;
using ck::cpu::value;

void fill(std::vector<float>& to, int64_t n, float scale) {
  to.resize(static_cast<size_t>(n));
  for (float& x : to) x = value() * scale;
}
void fill(std::vector<bf16>& to, int64_t n) {
  to.resize(static_cast<size_t>(n));
  for (bf16& x : to) x = ck::cpu::upper_half(value());
}

// Zeros of tensors' sizes: a term that is not there.
struct Shape {
  int64_t B, T, S, H, G, D, R, left, right;
  Outside outside;
  bool bias, query_rel, key_rel, conv, causal, masked, packed;
  double dropout;
  uint64_t hash;
};

struct Case {
  Shape s;
  std::vector<bf16> q, k, v, r, grad;
  std::vector<float> bias, query_rel, grad_lse, taps, taps_bias, taps_scale, key_rel;
  std::unique_ptr<bool[]> mask;
  std::vector<int64_t> query_offsets, key_offsets;

  explicit Case(const Shape& shape) : s(shape), mask(new bool[static_cast<size_t>(s.B * s.S)]) {
    ck::cpu::state = ck::cpu::kFirstState;
    fill(q, s.B * s.T * s.H * s.D);
    fill(k, s.B * s.S * s.G * s.D);
    fill(v, s.B * s.S * s.G * s.D);
    fill(grad, s.B * s.T * s.H * s.D);
    fill(r, s.B * s.T * s.H * s.R);
    const int64_t W = s.left + s.right + 1;
    fill(bias, s.H * W, 1.0f);
    fill(query_rel, (s.R > 0 ? s.R : s.D) * W, 0.25f);
    fill(grad_lse, s.B * s.H * s.T, 1.0f);
    for (int64_t n = 0; n < s.B * s.S; ++n) mask[static_cast<size_t>(n)] = draw() % 5 != 0;
    fill(taps, s.H * s.D * W, 0.25f);
    fill(taps_bias, s.H * s.D, 1.0f);
    fill(taps_scale, s.H, 1.0f);
    fill(key_rel, s.H * s.D * W, 0.25f);
    query_offsets = {0, s.T / 3, s.T / 3, s.T - 5, s.T};
    key_offsets = {0, s.S / 2, s.S / 2 + 3, s.S, s.S};
  }

  HeadRows rows(const std::vector<bf16>& t, int64_t time, int64_t heads, int64_t n) const {
    return {const_cast<bf16*>(t.data()), time * heads * n, heads * n, n, 1};
  }

  void enter(AttentionProblem& p) const {
    const int64_t W = s.left + s.right + 1;
    p.batch = s.B;
    p.queries = s.T;
    p.keys = s.S;
    p.heads = s.H;
    p.groups = s.G;
    p.channels = s.D;
    p.rank = s.R > 0 ? s.R : s.D;
    p.left = s.left;
    p.right = s.right;
    p.outside = s.outside;
    p.causal = s.causal;
    p.scale = p.rel_scale = 0.125;
    p.dropout = s.dropout;
    p.seed = 12345;
    p.dtype = ck::Dtype::kBFloat16;
    p.q = rows(q, s.T, s.H, s.D);
    p.k = rows(k, s.S, s.G, s.D);
    p.v = rows(v, s.S, s.G, s.D);
    if (s.R > 0) p.rel_query = rows(r, s.T, s.H, s.R);
    if (s.bias) p.bias = {const_cast<float*>(bias.data()), ck::Dtype::kFloat32, true, W, 0, 1};
    if (s.query_rel) p.query_rel = {const_cast<float*>(query_rel.data()), ck::Dtype::kFloat32, false, 0, W, 1};
    if (s.key_rel) p.key_rel = {const_cast<float*>(key_rel.data()), ck::Dtype::kFloat32, true, s.D * W, W, 1};
    if (s.conv) {
      p.value_conv = {const_cast<float*>(taps.data()), ck::Dtype::kFloat32, true, s.D * W, W, 1};
      p.value_conv_bias = {const_cast<float*>(taps_bias.data()), ck::Dtype::kFloat32, true, s.D, 1, 0};
      p.value_conv_scale = {const_cast<float*>(taps_scale.data()), ck::Dtype::kFloat32, true, 1, 0, 0};
    }
    if (s.masked) {
      p.key_mask = mask.get();
      p.mask_batch = s.S;
      p.mask_key = 1;
    }
    if (s.packed) {
      p.sequences = 4;
      p.query_offsets = query_offsets.data();
      p.key_offsets = key_offsets.data();
    }
  }
};

// out and the gradients of q, k, v and rel_query; lse and the gradients of tables.
struct Results {
  std::vector<bf16> rows[5];
  std::vector<float> numbers[7];

  uint64_t hash() const { return ck::cpu::hash_of(rows, numbers); }

  std::vector<std::vector<double>> all() const {
    std::vector<std::vector<double>> list;
    for (const auto& part : rows) {
      list.emplace_back();
      for (const bf16 x : part) list.back().push_back(static_cast<double>(ck::cpu::number(x)));
    }
    for (const auto& part : numbers) list.emplace_back(part.begin(), part.end());
    return list;
  }
};

Results run(const Kernels& kernels, const Case& c, ck::cpu::ParallelFor parallel, int64_t threads) {
  const Shape& s = c.s;
  Results found;
  found.rows[0] = found.rows[1] = std::vector<bf16>(c.q.size(), bf16{0x7fc0});
  found.rows[2] = found.rows[3] = std::vector<bf16>(c.k.size(), bf16{0x7fc0});
  found.rows[4] = std::vector<bf16>(c.r.size(), bf16{0x7fc0});
  found.numbers[0].assign(c.grad_lse.size(), NAN);
  found.numbers[1].assign(s.bias ? c.bias.size() : 0, NAN);
  found.numbers[2].assign(s.query_rel ? c.query_rel.size() : 0, NAN);
  if (s.conv) {
    found.numbers[3].assign(c.taps.size(), NAN);
    found.numbers[4].assign(c.taps_bias.size(), NAN);
    found.numbers[5].assign(c.taps_scale.size(), NAN);
  }
  found.numbers[6].assign(s.key_rel ? c.key_rel.size() : 0, NAN);
  AttentionForward f;
  c.enter(f);
  f.parallel_for = parallel;
  f.threads = threads;
  f.out = c.rows(found.rows[0], s.T, s.H, s.D);
  f.lse = {found.numbers[0].data(), s.H * s.T, s.T, 1};
  CK_TRUE(kernels.attention_forward(f) == nullptr);
  AttentionBackward b;
  c.enter(b);
  b.parallel_for = parallel;
  b.threads = threads;
  b.grad = c.rows(c.grad, s.T, s.H, s.D);
  b.out = f.out;
  b.lse = f.lse;
  b.grad_lse = {const_cast<float*>(c.grad_lse.data()), s.H * s.T, s.T, 1};
  b.grad_q = c.rows(found.rows[1], s.T, s.H, s.D);
  b.grad_k = c.rows(found.rows[2], s.S, s.G, s.D);
  b.grad_v = c.rows(found.rows[3], s.S, s.G, s.D);
  if (s.R > 0) b.grad_rel_query = c.rows(found.rows[4], s.T, s.H, s.R);
  if (s.bias) b.grad_bias = found.numbers[1].data();
  if (s.query_rel) b.grad_query_rel = found.numbers[2].data();
  if (s.key_rel) b.grad_key_rel = found.numbers[6].data();
  if (s.conv) {
    b.grad_value_conv = found.numbers[3].data();
    b.grad_value_conv_bias = found.numbers[4].data();
    b.grad_value_conv_scale = found.numbers[5].data();
  }
  CK_TRUE(kernels.attention_backward(b) == nullptr);
  return found;
}

const Shape kShapes[] = {
    // B, T, S, H, G, D, R, left, right, outside, bias, query_rel, key_rel, conv, causal, masked, packed, dropout
    {1, 96, 96, 2, 2, 64, 0, 8, 8, Outside::kClip, true, true, false, false, false, false, false, 0.0,
     0x5562605d4292e271},
    {2, 70, 130, 2, 1, 40, 0, 3, 1, Outside::kZero, true, true, false, false, true, true, false, 0.0,
     0x9447ff8ac300ee79},
    {1, 333, 333, 1, 1, 128, 0, 30, 30, Outside::kMask, true, true, false, false, false, true, false, 0.0,
     0x5899146dc7703f1d},
    {1, 128, 128, 2, 2, 64, 0, 0, 0, Outside::kClip, false, false, false, false, true, false, false, 0.0,
     0x27bf3ea24b2f8990},
    {1, 90, 77, 2, 2, 32, 12, 20, 3, Outside::kClip, true, true, false, false, false, false, true, 0.25,
     0xef0af56afebf26a5},
    {2, 33, 300, 4, 2, 5, 0, 0, 70, Outside::kClip, true, false, false, false, false, true, false, 0.0,
     0x92eb6ce1580161ac},
    {1, 150, 150, 2, 1, 48, 0, 4, 2, Outside::kClip, true, false, false, true, true, false, false, 0.0,
     0xb839a69c2d2b3d26},
    {1, 90, 77, 4, 2, 20, 0, 2, 5, Outside::kMask, false, true, false, true, false, true, true, 0.5,
     0x1e8e66f0774e27a2},
    {1, 150, 150, 2, 1, 48, 0, 4, 2, Outside::kClip, true, false, true, false, false, true, false, 0.0,
     0xc595e6e0c47dda0a},
    {1, 90, 77, 4, 2, 80, 0, 2, 50, Outside::kZero, false, true, true, true, false, false, true, 0.5,
     0x4b18a9c9a1794810},
};

CK_TEST(the_same_bits_everywhere) {
  for (const Shape& shape : kShapes) {
    const Case c(shape);
    const uint64_t recorded = shape.hash;
    for (const Kernels* kernels : sets_with_tiles()) {
      CK_EQUAL(run(*kernels, c, serial, 1).hash(), recorded);
      CK_EQUAL(run(*kernels, c, halves, 2).hash(), recorded);
    }
    CK_EQUAL(run(ck::cpu::tiles_portable::kKernels, c, ck::cpu::scattered, 3).hash(), recorded);
  }
}

// In norm, as bfloat16 allows.
void compare_with_portable(const Case& c) {
  const auto expected = run(kernels_of("portable"), c, serial, 1).all();
  const auto found = run(*sets_with_tiles().back(), c, serial, 1).all();
  for (size_t n = 0; n < found.size(); ++n) {
    double size = 0, off = 0;
    for (size_t i = 0; i < found[n].size(); ++i) {
      if (found[n][i] == expected[n][i]) continue;  // lse of -inf
      size += expected[n][i] * expected[n][i];
      off += (found[n][i] - expected[n][i]) * (found[n][i] - expected[n][i]);
    }
    CK_TRUE(std::sqrt(off) <= 1e-2 * std::sqrt(size));
  }
}

CK_TEST(close_to_the_portable_kernels) {
  for (const Shape& shape : kShapes) compare_with_portable(Case(shape));
}

// Numbers of bfloat16 times a power of two.
void scale(std::vector<bf16>& numbers, int power) {
  for (bf16& x : numbers)
    if ((x.bits & 0x7f80) != 0) x.bits = static_cast<uint16_t>(x.bits + power * 128);
}

CK_TEST(values_and_scores_of_any_size) {
  for (const Shape& shape : {kShapes[0], kShapes[1]}) {
    for (const int power : {-90, 100}) {
      Case c(shape);
      scale(c.v, power);
      compare_with_portable(c);
    }
    for (const int power : {-40, 4, 7}) {  // of scores: up to thousands
      Case c(shape);
      scale(c.q, power);
      compare_with_portable(c);
    }
  }
}

}  // namespace

CK_TEST_MAIN()
