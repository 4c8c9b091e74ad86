// Attention: every instruction set that this machine runs, and the widest vectors on any machine, against the portable
// kernels, which the Python tests hold against the definition.
#include <cmath>
#include <random>
#include <vector>

#include "csrc/tests/check.h"
#include "csrc/tests/kernel_sets.h"

namespace {

using ck::HeadRows;
using ck::HeadTable;
using ck::Outside;
using ck::cpu::all_kernels;
using ck::cpu::AttentionBackward;
using ck::cpu::AttentionForward;
using ck::cpu::AttentionProblem;
using ck::cpu::Kernels;
using ck::cpu::scattered;

template <class S>
struct Case {
  int64_t B, T, K, H, G, D, R, left, right;
  bool bias, query_rel, rel_query, key_rel, conv, masked, causal, qk;
  Outside outside;
  double dropout;
  std::vector<S> q, k, v, r, grad, bias_table, query_table, key_table, taps, taps_bias, taps_scale, grad_lse;
  std::vector<char> mask;

  explicit Case(std::mt19937& random) {
    const auto pick = [&](std::initializer_list<int64_t> from) { return *(from.begin() + random() % from.size()); };
    const auto chance = [&](int percent) { return static_cast<int>(random() % 100) < percent; };
    B = pick({1, 2});
    T = pick({1, 3, 33, 97, 130, 250});
    K = chance(50) ? T : pick({1, 15, 64, 257, 300});
    G = pick({1, 2});
    H = G * pick({1, 1, 2});
    D = pick({1, 5, 16, 24, 33, 64});
    left = pick({0, 1, 3, 8, 40});
    right = pick({0, 1, 8, 17});
    bias = chance(50);
    query_rel = chance(50);
    rel_query = query_rel && chance(40);
    key_rel = chance(40);
    conv = chance(40);
    masked = chance(40);
    causal = chance(40);
    qk = chance(80);
    outside = static_cast<Outside>(random() % 3);
    dropout = chance(25) ? 0.3 : 0.0;
    R = rel_query ? pick({1, 6, 20}) : D;
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<S>& to, int64_t n) {
      to.resize(static_cast<size_t>(n));
      for (S& x : to) x = static_cast<S>(normal(random));
    };
    const int64_t W = left + right + 1;
    fill(q, B * T * H * D);
    fill(grad, B * T * H * D);
    fill(k, B * K * G * D);
    fill(v, B * K * G * D);
    fill(r, B * T * H * R);
    fill(bias_table, H * W);
    fill(query_table, H * R * W);
    fill(key_table, H * D * W);
    fill(taps, H * D * W);
    fill(taps_bias, H * D);
    fill(taps_scale, H);
    fill(grad_lse, B * H * T);
    mask.resize(static_cast<size_t>(B * K));
    for (char& m : mask) m = chance(70);
  }

  HeadRows rows(const std::vector<S>& t, int64_t time, int64_t heads, int64_t n) const {
    return {const_cast<S*>(t.data()), time * heads * n, heads * n, n, 1};
  }
  static constexpr ck::Dtype kType = std::is_same_v<S, double> ? ck::Dtype::kFloat64 : ck::Dtype::kFloat32;
  HeadTable table(const std::vector<S>& t, int64_t rows, int64_t columns) const {
    return {const_cast<S*>(t.data()), kType, true, rows * columns, columns, 1};
  }

  void enter(AttentionProblem& p) const {
    const int64_t W = left + right + 1;
    p.batch = B;
    p.queries = T;
    p.keys = K;
    p.heads = H;
    p.groups = G;
    p.channels = D;
    p.rank = R;
    p.left = left;
    p.right = right;
    p.outside = outside;
    p.causal = causal;
    p.qk = qk;
    p.scale = 0.3;
    p.rel_scale = rel_query ? 1.0 : 0.3;
    p.dropout = dropout;
    p.seed = 12345;
    p.dtype = kType;
    p.q = rows(q, T, H, D);
    p.k = rows(k, K, G, D);
    p.v = rows(v, K, G, D);
    if (rel_query) p.rel_query = rows(r, T, H, R);
    if (bias) p.bias = {const_cast<S*>(bias_table.data()), kType, true, W, 0, 1};
    if (query_rel) p.query_rel = table(query_table, R, W);
    if (key_rel) p.key_rel = table(key_table, D, W);
    if (conv) {
      p.value_conv = table(taps, D, W);
      p.value_conv_bias = {const_cast<S*>(taps_bias.data()), kType, true, D, 1, 0};
      p.value_conv_scale = {const_cast<S*>(taps_scale.data()), kType, true, 1, 0, 0};
    }
    if (masked) {
      p.key_mask = reinterpret_cast<const bool*>(mask.data());
      p.mask_batch = K;
      p.mask_key = 1;
    }
    p.parallel_for = scattered;
    p.threads = 3;
  }
};

// out, lse and all gradients, one after the other.
template <class S>
std::vector<S> results(const Kernels& kernels, const Case<S>& c) {
  const int64_t W = c.left + c.right + 1;
  std::vector<std::vector<S>> all;
  const auto make = [&](size_t n) -> std::vector<S>& { return all.emplace_back(n, static_cast<S>(NAN)); };
  all.reserve(16);
  AttentionForward f;
  c.enter(f);
  std::vector<S>&out = make(c.q.size()), &lse = make(c.grad_lse.size());
  f.out = c.rows(out, c.T, c.H, c.D);
  f.lse = {lse.data(), c.H * c.T, c.T, 1};
  CK_EQUAL(kernels.attention_forward(f) == nullptr, true);
  AttentionBackward b;
  c.enter(b);
  b.grad = c.rows(c.grad, c.T, c.H, c.D);
  b.out = f.out;
  b.lse = f.lse;
  b.grad_lse = {const_cast<S*>(c.grad_lse.data()), c.H * c.T, c.T, 1};
  b.grad_q = c.rows(make(c.q.size()), c.T, c.H, c.D);
  b.grad_k = c.rows(make(c.k.size()), c.K, c.G, c.D);
  b.grad_v = c.rows(make(c.v.size()), c.K, c.G, c.D);
  if (c.rel_query) b.grad_rel_query = c.rows(make(c.r.size()), c.T, c.H, c.R);
  if (c.bias) b.grad_bias = make(static_cast<size_t>(c.H * W)).data();
  if (c.query_rel) b.grad_query_rel = make(c.query_table.size()).data();
  if (c.key_rel) b.grad_key_rel = make(c.key_table.size()).data();
  if (c.conv) {
    b.grad_value_conv = make(c.taps.size()).data();
    b.grad_value_conv_bias = make(c.taps_bias.size()).data();
    b.grad_value_conv_scale = make(c.taps_scale.size()).data();
  }
  CK_EQUAL(kernels.attention_backward(b) == nullptr, true);
  std::vector<S> flat;
  for (const auto& part : all) flat.insert(flat.end(), part.begin(), part.end());
  return flat;
}

template <class S>
void compare(int cases, double tolerance) {
  const Kernels& portable = ck::cpu::kernels_of("portable");
  std::mt19937 random(3);
  for (int n = 0; n < cases; ++n) {
    const Case<S> c(random);
    const std::vector<S> expected = results(portable, c);
    for (const Kernels* kernels : all_kernels()) {
      if (kernels == &portable) continue;
      const std::vector<S> found = results(*kernels, c);
      double size = 1.0, worst = 0.0;
      for (size_t i = 0; i < found.size(); ++i) {
        if (std::isfinite(expected[i])) size = std::max(size, static_cast<double>(std::abs(expected[i])));
        const bool same = found[i] == expected[i];  // lse of -inf
        const double off = same ? 0.0 : static_cast<double>(std::abs(found[i] - expected[i]));
        worst = off <= worst ? worst : off;  // NaN stays
      }
      CK_EQUAL(worst <= tolerance * size, true);
    }
  }
}

CK_TEST(float64_equals_the_portable_kernels) { compare<double>(60, 1e-12); }

CK_TEST(float32_is_close_to_the_portable_kernels) { compare<float>(60, 2e-5); }

}  // namespace

CK_TEST_MAIN()
