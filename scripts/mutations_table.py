"""The faults that mutations.py seeds: replacements in the sources of the CPU and CUDA kernels."""

from dataclasses import dataclass

# The first file to fail ends the run, so the files that find most faults in the least time come first.
TESTS = [
    "tests/test_fuzz.py",
    "tests/test_equivalences.py",
    "tests/test_memory.py",
    "tests/test_philox.py",
    "tests/test_decoding.py",
    "tests/test_golden.py",
    "tests/test_attention_fuzz.py",
    "tests/test_attention_blocks.py",
    "tests/test_attention_fragments.py",
]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    before: str
    after: str

    @property
    def tests(self):
        """The test files that can fail because of it."""
        attention = [test for test in TESTS if "attention" in test]
        return attention if self.name.startswith("attention: ") else TESTS


CPU_MUTATIONS = [
    Mutation(
        "padding off by one",
        "csrc/common/taps.h",
        "return t + dilation * j - left; }",
        "return t + dilation * j - left + (left > 0 ? 1 : 0); }",
    ),
    Mutation(
        "mask not selected",
        "csrc/cpu/conv/rows.h",
        "if (position >= s.length() || masked(s, position)) return nullptr;",
        "if (position >= s.length()) return nullptr;",
    ),
    Mutation(
        "one halo row of a window dropped",
        "csrc/cpu/conv/rows.h",
        "static_cast<size_t>(halo_ * width_) * sizeof(Elem));",
        "static_cast<size_t>((halo_ > 0 ? halo_ - 1 : 0) * width_) * sizeof(Elem));",
    ),
    Mutation(
        "accumulation with 12 bits",
        "csrc/cpu/conv/convolve_tiles.h",
        "sum[i][u * kWidth + p] += held[k] * x[u * kWidth + p];",
        "sum[i][u * kWidth + p] = (sum[i][u * kWidth + p] + held[k] * x[u * kWidth + p]"
        " + splat(static_cast<C>(4096 * sizeof(C) / 4))) - splat(static_cast<C>(4096 * sizeof(C) / 4));",
    ),
    Mutation(
        "channel stride ignored",
        "csrc/cpu/conv/rows.h",
        "const int64_t stride = position < 0 ? 1 : rows.channel;",
        "const int64_t stride = 1;",
    ),
    Mutation(
        "taps of d(input) not reversed",
        "csrc/cpu/conv/forward.h",
        "sign_ = transpose ? -1 : 1;",
        "sign_ = 1, last_ = 0;",
    ),
    Mutation(
        "last rows left out of d(weight)",
        "csrc/cpu/conv/backward.h",
        "last = work.size() * (split + 1) / splits;",
        "last = work.size() * (split + 1) / splits - (splits > 1 && split + 1 == splits ? 1 : 0);",
    ),
    Mutation(
        "words of a Philox block in the wrong order",
        "csrc/cpu/conv/filters.h",
        "random.word[i] >= threshold",
        "random.word[3 - i] >= threshold",
    ),
    Mutation(
        "tail channels missing",
        "csrc/cpu/conv/forward.h",
        "ceil_div(plan.main, plan.per_block) + (plan.main < p.channels ? 1 : 0);",
        "max(1, ceil_div(plan.main, plan.per_block));",
    ),
    Mutation(
        "softmax without the maximum",
        "csrc/cpu/conv/filters.h",
        "vexp(load_bytes<Vec<C>>(out + k * pitch) - top);",
        "vexp(load_bytes<Vec<C>>(out + k * pitch));",
    ),
    Mutation(
        "softmax of another head's row",
        "csrc/cpu/conv/filters.h",
        "const C* row = logits + h * K;",
        "const C* row = logits + (h > 0 ? h - 1 : 0) * K;",
    ),
    Mutation(
        "windows reach into the next packed sequence",
        "csrc/cpu/conv/rows.h",
        "s.end = p.offsets != nullptr ? p.offsets[i + 1] : p.time;",
        "s.end = p.time;",
    ),
    Mutation(
        "state read one row too early",
        "csrc/cpu/conv/rows.h",
        "return state + (s.state_row * span + span + position) * channels;",
        "return state + (s.state_row * span + (span + position > 0 ? span + position - 1 : 0)) * channels;",
    ),
    Mutation(
        "derivative of the sigmoid without its second factor",
        "csrc/cpu/conv/rows.h",
        "xv[part] * (sig * (splat(C{1}) - sig));",
        "xv[part] * sig;",
    ),
    Mutation(
        "attention: edge not repeated left of the window",
        "csrc/cpu/attention/block.h",
        "c.window_first) > 0 ? left_[r] : C{0},",
        "c.window_first) > 0 ? C{0} : C{0},",
    ),
    Mutation(
        "attention: sum of a row not rescaled",
        "csrc/cpu/attention/forward.h",
        "sum_[r] = sum_[r] * factor + sum;",
        "sum_[r] = sum_[r] + sum;",
    ),
    Mutation(
        "attention: the next key is seen",
        "csrc/cpu/attention/positions.h",
        "visible.end = min(visible.end, position.at + 1);",
        "visible.end = min(visible.end, position.at + 2);",
    ),
    Mutation(
        "attention: padding is seen",
        "csrc/cpu/attention/block.h",
        "if (d_.count_real(batch(), first + c.first, first + c.end) < c.end - c.first) {",
        "if (d_.count_real(batch(), first + c.first, first + c.end) < 0) {",
    ),
    Mutation(
        "attention: the gradient of lse taken the other way",
        "csrc/cpu/attention/backward.h",
        "delta_[r] / total_[r]) - grad_lse_[r];",
        "delta_[r] / total_[r]) + grad_lse_[r];",
    ),
    Mutation(
        "attention: dropout of another block of words",
        "csrc/cpu/attention/dropout.h",
        "static_cast<uint32_t>((first + j) / 4)};",
        "static_cast<uint32_t>(j / 4)};",
    ),
    Mutation(
        "attention: the sums of a second task not added",
        "csrc/cpu/attention/sums.h",
        "if (first != task) add_to(",
        "if (first + 1 < task) add_to(",
    ),
]

CUDA_MUTATIONS = [
    Mutation(
        "no barrier before a block's sums are read",
        "csrc/cuda/conv/plain.cuh",
        "sums[threadIdx.x] = total[u];\n      __syncthreads();",
        "sums[threadIdx.x] = total[u];",
    ),
    Mutation(
        "no barrier before a block's sums are overwritten",
        "csrc/cuda/conv/plain.cuh",
        "* K + j0 + u] = all;\n      }\n      __syncthreads();",
        "* K + j0 + u] = all;\n      }",
    ),
    Mutation(
        "no barrier in the last sums",
        "csrc/cuda/conv/reduce.cuh",
        "sums[threadIdx.x] = total;\n    __syncthreads();",
        "sums[threadIdx.x] = total;",
    ),
    Mutation(
        "barrier that some threads leave out",
        "csrc/cuda/conv/reduce.cuh",
        "  sums[threadIdx.x] = total;\n  __syncthreads();\n  if (warp > 0 || c >= p.channels) return;",
        "  sums[threadIdx.x] = total;\n  if (warp > 0 || c >= p.channels) return;\n  __syncthreads();",
    ),
    Mutation(
        "shuffle with the wrong lane",
        "csrc/cuda/device/reduce.cuh",
        "value += __shfl_xor_sync(kAllLanes, value, distance);",
        "value += __shfl_xor_sync(kAllLanes, value, distance > 1 ? distance : 2);",
    ),
    Mutation(
        "shuffle that waits for lanes that are not there",
        "csrc/cuda/conv/reduce.cuh",
        "    inner = lane_sum(inner, team);",
        "    if (own == 0) inner = lane_sum(inner, team);",
    ),
    Mutation(
        "read past the end of the row",
        "csrc/cuda/conv/inputs.cuh",
        "return s >= begin && s < end; }",
        "return s >= begin && s <= end; }",
    ),
    Mutation(
        "write past the last channel",
        "csrc/cuda/conv/plain.cuh",
        "if (c < p.channels && s < p.time)",
        "if (s < p.time)",
    ),
    Mutation(
        "too little shared memory",
        "csrc/cuda/conv/instantiate/reduce.cu",
        "static_cast<size_t>(heads * p.taps.taps) * sizeof(C)",
        "static_cast<size_t>(heads * p.taps.taps - 1) * sizeof(C)",
    ),
    Mutation(
        "last group of partial sums left out",
        "csrc/cuda/conv/reduce.cuh",
        "group < p.groups; group += group_step",
        "group < max(int64_t{1}, p.groups - 1); group += group_step",
    ),
    Mutation(
        "mask not selected, only multiplied",
        "csrc/cuda/conv/inputs.cuh",
        "return masked(p, b, s) ? Compute<T>{0} : gated<T>(p, b, s, c);",
        "return gated<T>(p, b, s, c) * Compute<T>(masked(p, b, s) ? 0 : 1);",
    ),
    Mutation(
        "copies not waited for",
        "csrc/cuda/conv/stream.cuh",
        "      cp_async_wait<kAhead - 1>();",
        "      cp_async_wait<kAhead + 1>();",
    ),
    Mutation(
        "no barrier after the copies of other threads",
        "csrc/cuda/conv/stream_backward.cuh",
        "        cp_async_wait<kAhead - 1>();\n        __syncthreads();",
        "        cp_async_wait<kAhead - 1>();",
    ),
    Mutation(
        "channels stored that do not exist",
        "csrc/cuda/device/vectors.cuh",
        "if (e < count) to[e] =",
        "to[e] =",
    ),
    Mutation(
        "gradients of the state one row late",
        "csrc/cuda/conv/walk.cuh",
        "row = phase.position(n) + span;",
        "row = phase.position(n) + span + 1;",
    ),
    Mutation(
        "halves exchanged with the wrong lane",
        "csrc/cuda/conv/quads.cuh",
        "__shfl_xor_sync(kAllLanes, give.x, 1)",
        "__shfl_xor_sync(kAllLanes, give.x, 2)",
    ),
    Mutation(
        "rows: gradients added before all lanes have finished theirs",
        "csrc/cuda/conv/rows.cuh",
        "  __syncwarp();\n  if (!p.per_position) {",
        "  if (!p.per_position) {",
    ),
    Mutation(
        "rows: pieces of a head written to one place",
        "csrc/cuda/conv/rows.cuh",
        "(cut ? piece * p.batch : 0)",
        "(cut ? 0 * p.batch : 0)",
    ),
    Mutation(
        "band: copies not waited for",
        "csrc/cuda/conv/band_forward.cuh",
        "      cp_async_wait<kBandAhead - 1>();",
        "      cp_async_wait<kBandAhead + 1>();",
    ),
    Mutation(
        "band: no barrier between warps that copy logits and warps that read them",
        "csrc/cuda/conv/band.cuh",
        "  if constexpr (kOwn)\n    __syncthreads();\n  else\n    __syncwarp();",
        "  __syncwarp();",
    ),
    Mutation(
        "band: what is not finite spreads to neighbours",
        "csrc/cuda/conv/band.cuh",
        "return __any_sync(kAllLanes, !all_finite(found)) == 0;",
        "return __any_sync(kAllLanes, !all_finite(found)) >= 0;",
    ),
    Mutation(
        "band: what is not finite meets rows that do not exist",
        "csrc/cuda/conv/band_backward.cuh",
        "          if (fast && (outputs.position(int64_t{i} * kBandTile) < 0 ||",
        "          if (!fast && (outputs.position(int64_t{i} * kBandTile) < 0 ||",
    ),
    Mutation(
        "band: windows that cross a boundary of sequences",
        "csrc/cuda/conv/band_slow.cuh",
        "  if (p.offsets == nullptr) return true;\n  const int64_t t = rows",
        "  if (p.offsets != nullptr || tile >= 0) return true;\n  const int64_t t = rows",
    ),
    Mutation(
        "band: gradients of logits overwritten before they are stored",
        "csrc/cuda/conv/band_backward.cuh",
        "char* const to = logit_grads.at(i % 2, row)",
        "char* const to = logit_grads.at(0, row)",
    ),
    Mutation(
        "band: pieces of a head added up before they are there",
        "csrc/cuda/conv/band_backward.cuh",
        "            __syncthreads();  // the sums of the other pieces are there\n",
        "            __syncwarp();\n",
    ),
    Mutation(
        "band: the last tap of a gradient left out",
        "csrc/cuda/conv/band_gradients.cuh",
        "static_cast<unsigned>(first + at) < static_cast<unsigned>(taps)",
        "static_cast<unsigned>(first + at) + 1 < static_cast<unsigned>(taps)",
    ),
    Mutation(
        "band: the mask of the tile before",
        "csrc/cuda/conv/band.cuh",
        "    mask += int64_t{kBandTile} * rows.dilation * p.mask_time;\n    look_ahead();",
        "    look_ahead();\n    mask += int64_t{kBandTile} * rows.dilation * p.mask_time;",
    ),
    Mutation(
        "state overwritten while others read it",
        "csrc/cuda/conv/step.cuh",
        "  cp_async_wait<0>();\n  __syncthreads();\n  for",
        "  cp_async_wait<0>();\n  for",
    ),
    Mutation(
        "state overwritten before all outputs are made",
        "csrc/cuda/conv/step.cuh",
        "  __syncthreads();\n  const int held",
        "  const int held",
    ),
    Mutation(
        "rows of the state overwritten while others read them",
        "csrc/cuda/conv/step.cuh",
        "      __syncthreads();\n      block.store(",
        "      block.store(",
    ),
    Mutation(
        "attention: keys read before they have come",
        "csrc/cuda/attention/forward.cuh",
        "        cp_async_wait<1>();\n        __syncthreads();\n        const T* const k_rows",
        "        __syncthreads();\n        const T* const k_rows",
    ),
    Mutation(
        "attention: no barrier before keys are overwritten",
        "csrc/cuda/attention/forward.cuh",
        "        __syncthreads();\n      }\n      // Values of other sequences",
        "      }\n      // Values of other sequences",
    ),
    Mutation(
        "attention: no barrier before queries are overwritten, backward",
        "csrc/cuda/attention/backward_keys.cuh",
        "        cp_async_wait<0>();\n        __syncthreads();\n        if (has_strip && works",
        "        cp_async_wait<0>();\n        if (has_strip && works",
    ),
    Mutation(
        "attention: the last column taken for the edge",
        "csrc/cuda/attention/scores.cuh",
        "is_right = all_right || c >= W;",
        "is_right = all_right || c >= W - 1;",
    ),
    Mutation(
        "attention: sums of a row not shrunk",
        "csrc/cuda/attention/forward.cuh",
        "total[half] = total[half] * shrink[half] + sum;",
        "total[half] = total[half] + sum;",
    ),
    Mutation(
        "attention: dropout of the wrong row of a pair",
        "csrc/cuda/attention/scores.cuh",
        "pairs.own + lane / 4 + (odd ? 8 : 0)",
        "pairs.own + lane / 4 + (odd ? 0 : 8)",
    ),
    Mutation(
        "attention: strips of gradients keep an earlier tile",
        "csrc/cuda/attention/gradient_strip.cuh",
        "  if (!to.whole) to.clear();\n  const int base",
        "  const int base",
    ),
    Mutation(
        "attention: padding is seen",
        "csrc/cuda/attention/scores.cuh",
        "const bool sees = there && other",
        "const bool sees = other",
    ),
    Mutation(
        "attention: no barrier in the plain products",
        "csrc/cuda/attention/plain.cuh",
        "      stage_keys(keys, d0);\n      __syncthreads();",
        "      stage_keys(keys, d0);",
    ),
]
