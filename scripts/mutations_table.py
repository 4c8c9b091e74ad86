"""The faults that mutations.py seeds: replacements in the sources of the CPU kernels. Those in the CUDA kernels
are in mutations_cuda.py."""

from dataclasses import dataclass

# The first file to fail ends the run, so the files that find most faults in the least time come first.
TESTS = [
    "tests/test_conv_bands.py",
    "tests/test_cuda_epilogue.py",
    "tests/test_fuzz.py",
    "tests/test_equivalences.py",
    "tests/test_memory.py",
    "tests/test_philox.py",
    "tests/test_decoding.py",
    "tests/test_golden.py",
    "tests/test_attention_fuzz.py",
    "tests/test_attention_blocks.py",
    "tests/test_attention_costs.py",
    "tests/test_attention_fragments.py",
    "tests/test_attention_hidden.py",
    "tests/test_attention_range.py",
    "tests/test_attention_warpgroups.py",
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
        if self.name.startswith("attention: warpgroups, "):
            return ["tests/test_attention_warpgroups.py"]
        attention = [test for test in TESTS if "attention" in test and not (self.environment and "warpgroups" in test)]
        return attention if self.name.startswith("attention: ") else TESTS

    @property
    def environment(self):
        """What makes the kernel run. A simulated GPU of compute capability 9.0 has others for most of attention, and
        tiles are asked for by name."""
        if "/tiles/" in self.file:
            return {"CONVKERNELS_CPU_ISA": "amx-emulated"}
        tensor = [f"csrc/cuda/attention/{name}.cuh" for name in ("forward", "backward_queries", "backward_keys")]
        return {"CONVKERNELS_SIMT_ARCH": "80"} if self.file in tensor else {}


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
        "csrc/cpu/conv/blocks.h",
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
        "csrc/cpu/conv/blocks.h",
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
        "softmax over one tap too few",
        "csrc/cpu/conv/position_filters.h",
        "softmax_columns<false, C>(from, pitch, K, lower, upper);",
        "softmax_columns<false, C>(from, pitch, max(K - 1, 1), lower, upper);",
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
        "(s.before + position) * state.time;",
        "(s.before + position > 0 ? s.before + position - 1 : 0) * state.time;",
    ),
    Mutation(
        "positions that were taken back count",
        "csrc/cpu/conv/step.h",
        "s.before = states.old_row(number, s.length(), 0);",
        "s.before = states.width;",
    ),
    Mutation(
        "rows of a state moved in the order that overwrites them",
        "csrc/cpu/conv/step.h",
        "const int64_t row = by >= 0 ? i : kept - 1 - i,",
        "const int64_t row = i,",
    ),
    Mutation(
        "state on the way one position early",
        "csrc/cpu/conv/step.h",
        "leave(s, at - s.begin, into);",
        "leave(s, at - s.begin - 1, into);",
    ),
    Mutation(
        "state of one position kept one row behind",
        "csrc/cpu/conv/step.h",
        "store_bytes(to + w * to_row, row[w + 1]);",
        "store_bytes(to + w * to_row, row[w]);",
    ),
    Mutation(
        "state gathered from its first position on",
        "csrc/cpu/conv/transposed.h",
        "(from + first, stride, last - first, channels, to, pitch);",
        "(from, stride, last - first, channels, to, pitch);",
    ),
    Mutation(
        "derivative of the sigmoid without its second factor",
        "csrc/cpu/conv/epilogue.h",
        "return {s, s * (one - s)};",
        "return {s, s};",
    ),
    Mutation(
        "derivative of SiLU without its second term",
        "csrc/cpu/conv/epilogue.h",
        "s * (one + a * (one - s))};",
        "s};",
    ),
    Mutation(
        "gate of the result left out of the gradient of the sum",
        "csrc/cpu/conv/epilogue.h",
        "(out_gate != nullptr ? other[p] * open[p] : other[p]) * a.slope;",
        "other[p] * a.slope;",
    ),
    Mutation(
        "rows of an epilogue counted from each tile",
        "csrc/cpu/conv/epilogue.h",
        "part.first_row += row;",
        "part.first_row += row * 0;",
    ),
    Mutation(
        "last term of bands left out",
        "csrc/cpu/conv/tiles/convolve.h",
        "machine_.template dot<0, 6, 1>();",
        "",
    ),
    Mutation(
        "zeros of bands spread what is not finite",
        "csrc/cpu/conv/tiles/convolve.h",
        "return !any_bit((Words)(any != any));",
        "return true;",
    ),
    Mutation(
        "halo of a window on tiles one chunk too far",
        "csrc/cpu/conv/tiles/ring.h",
        "const int64_t first = continues ? slot_[outputs_] : 0;",
        "const int64_t first = continues ? slot_[outputs_ - 1] : 0;",
    ),
    Mutation(
        "taps behind the last one in bands",
        "csrc/cpu/conv/tiles/bands.h",
        "row[v] = keep_lanes((1u << inside) - 1, values[v][i]);",
        "row[v] = inside > 0 ? values[v][i] : Floats{};",
    ),
    Mutation(
        "products of denormal numbers left to tiles",
        "csrc/cpu/conv/tiles/correlate.h",
        "body(h, denormal ? 0 : whole);",
        "body(h, whole);",
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
        "attention: delta on tiles from the rounded result",
        "csrc/cpu/attention/tiles/backward.h",
        "if (depthwise_.exists() || key_terms_.exists()) find_delta(i);",
        "if (depthwise_.exists()) find_delta(i);",
    ),
    Mutation(
        "attention: last part of a table on tiles left out",
        "csrc/cpu/attention/tiles/data.h",
        "parts_(table.dtype == Dtype::kBFloat16 ? 1 : 3)",
        "parts_(table.dtype == Dtype::kBFloat16 ? 1 : 2)",
    ),
    Mutation(
        "attention: last part of gradients of scores on tiles left out",
        "csrc/cpu/attention/tiles/column_products.h",
        "kParts = 3,",
        "kParts = 2,",
    ),
    Mutation(
        "attention: exponentials of large scores taken as they are",
        "csrc/cpu/attention/bound.h",
        "direct[i] = room > 0 && size <= room * room;",
        "direct[i] = room > 0 && size >= 0;",
    ),
    Mutation(
        "attention: keys that a row does not see bound its scores",
        "csrc/cpu/attention/bound.h",
        "longest(block_.position(i).visible)",
        "longest(Range{0, d.p.keys})",
    ),
    Mutation(
        "attention: sums that are nearly 0 left as they are",
        "csrc/cpu/attention/forward.h",
        "if ((!found.finite || found.tiny) && subtract_maxima())",
        "if (!found.finite && subtract_maxima())",
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
