// Every instruction set that this machine runs against a few plain loops, without torch, in every storage type.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "csrc/common/philox.h"
#include "csrc/tests/check.h"
#include "csrc/tests/kernel_sets.h"

namespace {

using namespace ck::cpu;

void serial(int64_t n, ck::cpu::ParallelBody body, void* context) { body(0, n, context); }

double number(double v) { return v; }
double number(float v) { return v; }
double number(ck::bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
double number(ck::f16 v) {
  const int exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return v.bits & 0x8000 ? -size : size;
}

// Numbers that every storage type holds exactly: a few bits around 1.
template <class S>
S exact(double v) {
  const double rounded = std::round(std::max(-3.0, std::min(3.0, v)) * 32.0) / 32.0;
  if constexpr (sizeof(S) > 2) {
    return static_cast<S>(rounded);
  } else {
    static const std::map<double, S> all = [] {
      std::map<double, S> table;
      for (uint32_t bits = 0; bits < 0x10000; ++bits)
        if ((bits & 0x7c00) != 0x7c00) table[number(S{static_cast<uint16_t>(bits)})] = S{static_cast<uint16_t>(bits)};
      return table;
    }();
    return all.at(rounded);
  }
}

template <class S>
constexpr ck::Dtype kDtype = std::is_same_v<S, double>     ? ck::Dtype::kFloat64
                             : std::is_same_v<S, float>    ? ck::Dtype::kFloat32
                             : std::is_same_v<S, ck::bf16> ? ck::Dtype::kBFloat16
                                                           : ck::Dtype::kFloat16;

template <class S>
struct Case {
  int64_t B, T, H, R, K, left, dilation;
  bool per_position, softmax, renormalize, gated, masked, with_state, with_bias;
  double dropout;
  std::vector<S> x, gate, weight, bias, state, dy;
  std::vector<char> mask;

  int64_t C() const { return H * R; }
  int64_t span() const { return dilation * (K - 1); }
  int64_t weights() const { return (per_position ? B * T : 1) * H * K; }
};

template <class S>
Case<S> random_case(std::mt19937& random) {
  const auto pick = [&](std::initializer_list<int> from) { return *(from.begin() + random() % from.size()); };
  const auto chance = [&](int percent) { return static_cast<int>(random() % 100) < percent; };
  Case<S> c;
  c.B = pick({1, 2, 3});
  c.T = pick({1, 2, 5, 8, 17, 40, 65});
  c.H = pick({1, 2, 3});
  c.R = pick({1, 3, 8, 16, 20, 32});
  c.K = pick({1, 2, 3, 4, 7, 8, 9, 15, 31});
  c.dilation = pick({1, 1, 2, 3});
  c.with_state = chance(25);
  c.left = c.with_state ? c.span() : static_cast<int64_t>(random() % static_cast<unsigned>(c.span() + 1));
  c.per_position = chance(50);
  c.softmax = chance(60);
  c.renormalize = c.softmax && chance(30);
  c.gated = chance(30);
  c.masked = chance(30);
  c.with_bias = chance(30);
  c.dropout = chance(25) ? 0.4 : 0.0;
  std::normal_distribution<double> normal;
  const auto fill = [&](std::vector<S>& v, int64_t n) {
    v.resize(static_cast<size_t>(n));
    for (S& e : v) e = exact<S>(normal(random));
  };
  const int64_t size = c.B * c.T * c.C();
  fill(c.x, size);
  fill(c.gate, c.gated ? size : 0);
  fill(c.dy, size);
  fill(c.weight, c.weights());
  fill(c.bias, c.with_bias ? c.C() : 0);
  fill(c.state, c.with_state ? c.B * c.span() * c.C() : 0);
  c.mask.assign(static_cast<size_t>(c.B * c.T), 1);
  if (c.masked)
    for (char& m : c.mask) m = chance(70);
  return c;
}

struct Results {
  std::vector<double> y, dx, dgate, dweight, dbias, dstate;
};

// The definition, one term after the other, in double.
template <class S>
Results plain(const Case<S>& c) {
  const int64_t C = c.C(), K = c.K, span = c.span();
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  Results r;
  r.y.assign(c.x.size(), 0);
  r.dx = r.dgate = r.y;
  r.dweight.assign(c.weight.size(), 0);
  r.dbias.assign(static_cast<size_t>(C), 0);
  r.dstate.assign(c.state.size(), 0);
  std::vector<double> dz(c.x.size(), 0);
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t h = 0; h < c.H; ++h) {
        const int64_t at = ((c.per_position ? b * c.T + t : 0) * c.H + h) * K;
        std::vector<double> soft(static_cast<size_t>(K)), keep(static_cast<size_t>(K), 1.0),
            dfilter(static_cast<size_t>(K), 0.0);
        double top = -INFINITY, sum = 0;
        const auto inside = [&](int64_t k) {
          const int64_t s = t + c.dilation * k - c.left;
          return s < c.T && s >= (c.with_state ? -span : 0);
        };
        const auto counts = [&](int64_t k) { return !c.renormalize || inside(k); };
        for (int64_t k = 0; k < K; ++k)
          if (counts(k)) top = std::max(top, number(c.weight[static_cast<size_t>(at + k)]));
        for (int64_t k = 0; k < K; ++k) {
          const double w = number(c.weight[static_cast<size_t>(at + k)]);
          soft[static_cast<size_t>(k)] = !c.softmax ? w : counts(k) ? std::exp(w - top) : 0.0;
          sum += soft[static_cast<size_t>(k)];
        }
        for (int64_t k = 0; k < K; ++k) {
          if (c.softmax) soft[static_cast<size_t>(k)] = sum > 0 ? soft[static_cast<size_t>(k)] / sum : 0.0;
          if (c.dropout > 0) {
            const auto words = ck::tap_words(1234, c.per_position ? b : 0, c.per_position ? t : 0, h, k / 4);
            keep[static_cast<size_t>(k)] =
                words.word[k % 4] >= ck::drop_threshold(c.dropout) ? 1.0 / (1.0 - c.dropout) : 0.0;
          }
        }
        for (int64_t i = 0; i < c.R; ++i) {
          const int64_t channel = h * c.R + i;
          const auto out = static_cast<size_t>((b * c.T + t) * C + channel);
          if (c.with_bias) r.y[out] += number(c.bias[static_cast<size_t>(channel)]);
          r.dbias[static_cast<size_t>(channel)] += number(c.dy[out]);
          for (int64_t k = 0; k < K; ++k) {
            const int64_t s = t + c.dilation * k - c.left;
            if (!inside(k) || (s >= 0 && !c.mask[static_cast<size_t>(b * c.T + s)])) continue;
            const double filter = soft[static_cast<size_t>(k)] * keep[static_cast<size_t>(k)];
            double z;
            if (s < 0) {
              const auto in = static_cast<size_t>((b * span + span + s) * C + channel);
              z = number(c.state[in]);
              r.dstate[in] += filter * number(c.dy[out]);
            } else {
              const auto in = static_cast<size_t>((b * c.T + s) * C + channel);
              z = number(c.x[in]) * (c.gated ? sigmoid(number(c.gate[in])) : 1.0);
              dz[in] += filter * number(c.dy[out]);
            }
            r.y[out] += filter * z;
            dfilter[static_cast<size_t>(k)] += z * number(c.dy[out]);
          }
        }
        double dot = 0;
        for (int64_t k = 0; k < K; ++k) {
          dfilter[static_cast<size_t>(k)] *= keep[static_cast<size_t>(k)];
          dot += dfilter[static_cast<size_t>(k)] * soft[static_cast<size_t>(k)];
        }
        for (int64_t k = 0; k < K; ++k)
          r.dweight[static_cast<size_t>(at + k)] +=
              c.softmax ? soft[static_cast<size_t>(k)] * (dfilter[static_cast<size_t>(k)] - dot)
                        : dfilter[static_cast<size_t>(k)];
      }
    }
  }
  for (size_t i = 0; i < dz.size(); ++i) {
    const double s = c.gated ? sigmoid(number(c.gate[i])) : 1.0;
    r.dx[i] = dz[i] * s;
    if (c.gated) r.dgate[i] = dz[i] * number(c.x[i]) * s * (1.0 - s);
  }
  return r;
}

template <class S>
void fill_problem(ConvProblem& p, Case<S>& c) {
  p.batch = c.B;
  p.time = c.T;
  p.channels = c.C();
  p.heads = c.H;
  p.taps = {c.K, c.left, c.dilation};
  p.dtype = p.weight_dtype = p.bias_dtype = kDtype<S>;
  const int64_t C = c.C();
  p.x = {c.x.data(), c.T * C, C, 1};
  if (c.gated) p.gate = {c.gate.data(), c.T * C, C, 1};
  if (c.masked) {
    p.mask = reinterpret_cast<const bool*>(c.mask.data());
    p.mask_batch = c.T;
    p.mask_time = 1;
  }
  if (c.with_state) p.state = c.state.data();
  p.weight = c.weight.data();
  p.per_position = c.per_position;
  p.weight_batch = c.per_position ? c.T * c.H * c.K : 0;
  p.weight_time = c.per_position ? c.H * c.K : 0;
  p.weight_head = c.K;
  p.weight_tap = 1;
  p.softmax = c.softmax;
  p.renormalize = c.renormalize;
  p.dropout = c.dropout;
  p.seed = 1234;
  p.parallel_for = serial;
  p.threads = 2;
}

template <class S>
void check_close(const char* what, const std::vector<S>& got, const std::vector<double>& expected, double tolerance) {
  double worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(number(got[i]) - expected[i]) / (1.0 + std::abs(expected[i]));
    worst = error <= worst ? worst : error;  // a NaN gets through
  }
  if (!(worst <= tolerance)) ck::test::fail(__FILE__, __LINE__, std::string(what) + ": error " + ck::test::show(worst));
}

template <class S>
void run_cases(const Kernels& kernels, int count, double tolerance) {
  std::mt19937 random(7);
  for (int n = 0; n < count; ++n) {
    Case<S> c = random_case<S>(random);
    const Results expected = plain(c);
    const int64_t C = c.C();
    for (const auto parallel_for : {serial, scattered}) {
      ConvForward f;
      fill_problem(f, c);
      f.parallel_for = parallel_for;
      std::vector<S> y(c.x.size());
      f.y = {y.data(), c.T * C, C, 1};
      if (c.with_bias) f.bias = c.bias.data();
      CK_EQUAL(kernels.conv_forward(f) == nullptr, true);
      check_close("y", y, expected.y, tolerance);

      ConvBackward g;
      fill_problem(g, c);
      g.parallel_for = parallel_for;
      std::vector<S> dx(c.x.size()), dgate(c.gate.size()), dweight(c.weight.size()), dbias(static_cast<size_t>(C)),
          dstate(c.state.size());
      g.grad = {c.dy.data(), c.T * C, C, 1};
      g.grad_x = {dx.data(), c.T * C, C, 1};
      if (c.gated) g.grad_gate = {dgate.data(), c.T * C, C, 1};
      g.grad_weight = dweight.data();
      g.grad_bias = dbias.data();
      if (c.with_state && c.span() > 0) g.grad_state = dstate.data();
      CK_EQUAL(kernels.conv_backward(g) == nullptr, true);
      check_close("dx", dx, expected.dx, tolerance);
      if (c.gated) check_close("dgate", dgate, expected.dgate, tolerance);
      check_close("dweight", dweight, expected.dweight, tolerance);
      check_close("dbias", dbias, expected.dbias, tolerance);
      if (c.with_state) check_close("dstate", dstate, expected.dstate, tolerance);
    }
  }
}

// Step by step with a moving state gives what one causal pass gives.
void run_steps(const Kernels& kernels) {
  std::mt19937 random(11);
  for (int n = 0; n < 20; ++n) {
    Case<double> c = random_case<double>(random);
    c.per_position = c.masked = c.renormalize = false;
    c.mask.assign(c.mask.size(), 1);
    c.dropout = 0.0;
    c.left = c.span();
    c.weight.resize(static_cast<size_t>(c.weights()));
    c.with_state = true;
    c.state.assign(static_cast<size_t>(c.B * c.span() * c.C()), 0.5);
    const std::vector<double> expected = plain(c).y;
    // Rows of the state behind those that are read, and steps of one to three positions.
    const int64_t C = c.C(), extra = n % 3, width = c.span() + extra;
    std::vector<double> state(static_cast<size_t>(c.B * width * C), 7.0), y(c.x.size());
    for (int64_t b = 0; b < c.B; ++b) std::fill_n(state.data() + (b * width + extra) * C, c.span() * C, 0.5);
    for (int64_t t = 0, time; t < c.T; t += time) {
      time = std::min<int64_t>(1 + (n + t) % 3, c.T - t);
      ConvStep f;
      fill_problem(f, c);
      f.time = time;
      f.states.pool = f.old = {state.data(), width * C, C, 1};
      f.states.slots = f.states.sequences = c.B, f.states.width = width;
      f.x = {c.x.data() + t * C, c.T * C, C, 1};
      if (c.gated) f.gate = {c.gate.data() + t * C, c.T * C, C, 1};
      if (c.with_bias) f.bias = c.bias.data();
      f.y = {y.data() + t * C, c.T * C, C, 1};
      CK_EQUAL(kernels.conv_step(f) == nullptr, true);
    }
    check_close("steps", y, expected, 1e-12);
  }
}

CK_TEST(float64_equals_plain_loops) {
  for (const Kernels* k : all_kernels()) run_cases<double>(*k, 150, 1e-11);
}

CK_TEST(float32_is_close_to_plain_loops) {
  for (const Kernels* k : all_kernels()) run_cases<float>(*k, 150, 2e-4);
}

CK_TEST(sixteen_bits_are_close_to_plain_loops) {
  for (const Kernels* k : all_kernels()) {
    run_cases<ck::bf16>(*k, 60, 1e-2);
    run_cases<ck::f16>(*k, 60, 2e-3);
  }
}

CK_TEST(steps_equal_one_causal_pass) {
  for (const Kernels* k : all_kernels()) run_steps(*k);
}

// One tap of weight 1: the output is the gated input, and so is what comes back.
template <class S>
Case<S> identity(std::vector<S> x, std::vector<S> gate) {
  Case<S> c{};
  c.B = c.T = c.R = c.K = c.dilation = 1;
  c.H = static_cast<int64_t>(x.size());
  c.gated = !gate.empty();
  c.weight.assign(x.size(), exact<S>(1.0));
  c.x = c.dy = std::move(x);
  c.gate = std::move(gate);
  return c;
}

template <class S>
std::pair<std::vector<S>, std::vector<S>> forward_and_back(const Kernels& kernels, Case<S>& c) {
  std::vector<S> y(c.x.size()), dx(c.x.size());
  ConvForward f;
  fill_problem(f, c);
  f.y = {y.data(), c.C(), c.C(), 1};
  CK_EQUAL(kernels.conv_forward(f) == nullptr, true);
  ConvBackward g;
  fill_problem(g, c);
  g.grad = {c.dy.data(), c.C(), c.C(), 1};
  g.grad_x = {dx.data(), c.C(), c.C(), 1};
  CK_EQUAL(kernels.conv_backward(g) == nullptr, true);
  return {y, dx};
}

CK_TEST(gates_far_from_zero_open_and_close) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> gates = {-inf,   -1e30f, -104.0f, -89.0f, -88.7f, -88.5f, -88.0f, -87.5f, -87.0f,
                                    -80.0f, 0.0f,   17.0f,   87.0f,  88.0f,  89.0f,  1e30f,  inf};
  for (const Kernels* k : all_kernels()) {
    Case<float> c = identity<float>(std::vector<float>(gates.size(), 1e38f), gates);
    const auto [y, dx] = forward_and_back(*k, c);
    for (size_t i = 0; i < gates.size(); ++i) {
      const double expected = 1e38 * (1.0 / (1.0 + static_cast<double>(std::exp(-gates[i]))));
      CK_EQUAL(std::abs(y[i] - expected) <= 1e-6 * expected, true);
      CK_EQUAL(dx[i], y[i]);
    }
  }
}

CK_TEST(denormals_pass_through) {
  const auto check = [](const auto& all) {
    using S = std::decay_t<decltype(all[0])>;
    for (const Kernels* k : all_kernels()) {
      Case<S> c = identity<S>(all, {});
      const auto [y, dx] = forward_and_back(*k, c);
      for (size_t i = 0; i < all.size(); ++i) {
        CK_EQUAL(number(y[i]), number(all[i]));
        CK_EQUAL(number(dx[i]), number(all[i]));
      }
    }
  };
  std::vector<ck::bf16> bfloats;
  std::vector<ck::f16> halves;
  for (uint16_t bits = 0; bits < 0x100; ++bits) {  // bfloat16: all denormals, and as many normal numbers
    bfloats.push_back({bits});
    bfloats.push_back({static_cast<uint16_t>(bits | 0x8000)});
  }
  for (uint16_t bits = 0; bits < 0x800; ++bits) halves.push_back({bits});
  check(bfloats);
  check(halves);
  check(std::vector<float>{1e-45f, -1e-44f, 1e-39f, 1.2e-38f});
}

CK_TEST(unknown_instruction_sets_are_refused) {
  CK_EQUAL(ck::cpu::isa_supported("sse9"), false);
  CK_THROWS(ck::cpu::kernels_of("sse9"));
}

}  // namespace

CK_TEST_MAIN()
