// Filters that differ between positions, and their gradients, in shared memory. A warp makes and finishes those of its
// own rows, a lane for each, so that nothing is exchanged between lanes.
#pragma once

#include "csrc/cuda/conv/walk.cuh"

namespace ck::cuda {

// Whether the windows of rows n .. n + kRun - 1 of a phase, all of which exist, lie within a sequence as a whole.
CK_DEVICE bool whole_windows(const Problem& p, const Phase& phase, int64_t n) {
  const int64_t top = phase.position(n), end = phase.position(n + kRun - 1);
  if (top < 0 || end >= p.time) return false;
  const Sequence sequence = sequence_of(p, top);
  return end < sequence.end && p.taps.source(top, 0) >= sequence.first &&
         p.taps.source(end, p.taps.taps - 1) < sequence.end;
}

// Multiplies what a filter's taps have in shared memory by dropout's factors.
CK_DEVICE void drop_taps(const Problem& p, const FilterAt& at, float* values) {
  if (p.seed == nullptr) return;
  const int taps = static_cast<int>(p.taps.taps);
#pragma unroll 1
  for (int j = 0; j < taps; j += 4) {
    const PhiloxBlock words = tap_words(static_cast<uint64_t>(*p.seed), at.b, at.t, at.h, j / 4);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (j + e < taps) values[j + e] *= keep_factor<float>(p, words, j + e);
  }
}

// Filters that positions share, kept by a warp from the first whole windows that it computes.
struct CommonFilters {
  float* values;
  bool known = false;
};

// A table [row][head of the block][tap] in shared memory, in which a warp has kRun rows at a time.
struct FilterRows {
  float* values;
  int heads, taps, pitch;  // pitch: from one head to the next, odd so that heads lie in different banks
  int lanes;               // that share a head
  // Where the numbers of rows are copied: how many of a row, and rows, at a time, and a lane's first one.
  int width, step, first_row, first_head, first_tap;

  CK_DEVICE FilterRows(const Problem& p, int lanes, char* shared)
      : values(reinterpret_cast<float*>(shared)),
        heads(32 / lanes),
        taps(static_cast<int>(p.taps.taps)),
        pitch(static_cast<int>(rows_pitch(p.taps.taps))),
        lanes(lanes),
        width(min(heads * taps, 32)),
        step(32 / width) {
    const int lane = threadIdx.x % 32;
    first_row = lane < step * width ? lane / width : kRun;
    first_head = lane % width / taps;
    first_tap = lane % width - first_head * taps;
  }

  CK_DEVICE int row_pitch() const { return heads * pitch; }
  CK_DEVICE float* row(int number) const { return values + number * row_pitch(); }
  // Filters of a row for the head that lane serves.
  CK_DEVICE float* of_lane(int number, int lane) const { return row(number) + lane / lanes * pitch; }

  // Calls use(i, h, t, offset) for the filters of rows n .. n + rows - 1 of a phase, a lane for each, which lie at an
  // offset from the first of these rows. Those that do not exist have t = -1.
  template <class Use>
  CK_DEVICE void for_each_filter(const Problem& p, const Phase& phase, int64_t n, int rows, int64_t h0,
                                 const Use& use) const {
#pragma unroll 1
    for (int item = threadIdx.x % 32; item < rows * heads; item += 32) {
      const int i = item * lanes / 32;  // heads is 32 / lanes
      const int64_t t = phase.position(n + i), h = h0 + item - i * heads;
      use(i, h, within(t, p.time) && h < p.heads ? t : -1, item * pitch);
    }
  }

  // Calls use(memory, offset, exists) for the numbers of rows n .. n + kRun - 1 of a phase, those of a row by lanes
  // side by side: where each lies in memory with such strides, in elements, and in the table from the first of these
  // rows on.
  template <class Use>
  CK_DEVICE void for_each_number(const Problem& p, const Phase& phase, int64_t n, int64_t h0, int64_t base,
                                 int64_t time_stride, int64_t head_stride, int64_t tap_stride, const Use& use) const {
    const int64_t hop = step * phase.dilation, first = phase.position(n + first_row);
    int head = first_head, tap = first_tap;
#pragma unroll 1
    while (head < heads) {
      int64_t t = h0 + head < p.heads ? first : p.time;
      int64_t memory = base + first * time_stride + (h0 + head) * head_stride + tap * tap_stride;
      int offset = first_row * row_pitch() + head * pitch + tap;
#pragma unroll 2
      for (int i = first_row; i < kRun; i += step) {
        use(i, memory, offset, within(t, p.time));
        t += hop;
        memory += hop * time_stride;
        offset += step * row_pitch();
      }
#pragma unroll 1
      for (tap += width; tap >= taps; tap -= taps) ++head;
    }
  }

  // Starts the copy of the logits of rows n .. n + kRun - 1 of a phase, of which `wanted` are needed, to rows `first`
  // .. of the table. By one warp.
  CK_DEVICE void copy(const Problem& p, const Phase& phase, int64_t b, int64_t n, int64_t h0, int first,
                      int wanted) const {
    float* const to = row(first);
    const auto copy_by = [&](const auto& copy_number) {
      for_each_number(p, phase, n, h0, b * p.weight_batch, p.weight_time, p.weight_head, p.weight_tap,
                      [&](int i, int64_t from, int offset, bool exists) {
                        if (exists && i < wanted) copy_number(to + offset, from);
                      });
    };
    if (p.weight_dtype == Dtype::kFloat32)
      copy_by(
          [&](float* shared, int64_t from) { cp_async<4>(shared, static_cast<const float*>(p.weight) + from, true); });
    else
      copy_by([&](float* shared, int64_t from) { *shared = load_as<float>(p.weight, from, p.weight_dtype); });
  }

  // Makes the filters of rows n .. n + kRun - 1 of a phase, rows `first` .. of the table: in place, of the logits that
  // have arrived there, or of those that positions share. By one warp.
  CK_DEVICE void make(const Problem& p, const Phase& phase, int64_t b, int64_t n, int64_t h0, int first,
                      CommonFilters& common) const {
    const bool whole = !p.per_position && whole_windows(p, phase, n);
    if (whole && common.known) {
#pragma unroll 1
      for (int at = threadIdx.x % 32; at < row_pitch(); at += 32)
        for (int i = 0; i < kRun; ++i) row(first + i)[at] = common.values[at];
      return;
    }
    for_each_filter(p, phase, n, kRun, h0, [&](int, int64_t h, int64_t t, int offset) {
      float* const filter = row(first) + offset;
      if (t < 0) {
#pragma unroll 1
        for (int j = 0; j < taps; ++j) filter[j] = 0;
        return;
      }
      const FilterAt at(p, b, t, h);
      if (!p.per_position)
#pragma unroll 1
        for (int j = 0; j < taps; ++j) filter[j] = logit<float>(p, at, j);
      if (p.softmax) normalize(p, t, filter);
      drop_taps(p, at, filter);
    });
    if (!whole) return;
    __syncwarp();
#pragma unroll 1
    for (int at = threadIdx.x % 32; at < row_pitch(); at += 32) common.values[at] = row(first)[at];
    common.known = true;
  }

  // From products to d(weight) of rows n .. n + rows - 1 of a phase, in place: through dropout and softmax.
  // filter_row(i): the filters of row n + i. By one warp.
  template <class Filter>
  CK_DEVICE void differentiate(const Problem& p, const Phase& phase, int64_t b, int64_t n, int64_t h0, int rows,
                               float* products, const Filter& filter_row) const {
    for_each_filter(p, phase, n, rows, h0, [&](int i, int64_t h, int64_t t, int offset) {
      if (t < 0) return;
      const FilterAt at(p, b, t, h);
      float* const d = products + offset;
      drop_taps(p, at, d);
      if (!p.softmax) return;
      const float* const filter = filter_row(i) + (offset - i * row_pitch());
      const auto finish = [&](auto unroll, const auto& probability) {
        [[maybe_unused]] constexpr int kUnroll = decltype(unroll)::value;  // by nvcc alone
        float inner = 0;
#pragma unroll kUnroll
        for (int j = 0; j < taps; ++j) inner += probability(j) * d[j];
#pragma unroll kUnroll
        for (int j = 0; j < taps; ++j) d[j] = probability(j) * (d[j] - inner);
      };
      if (p.seed == nullptr) return finish(std::integral_constant<int, 4>{}, [&](int j) { return filter[j]; });
      // Of taps that were dropped, the filter is zero.
      const Sequence sequence = sequence_of(p, t);
      const Statistics<float> statistics = statistics_of<float>(p, at, t, sequence);
      finish(std::integral_constant<int, 1>{}, [&](int j) { return tap_of(p, at, t, j, statistics, sequence).p; });
    });
  }

  // Adds rows first .. first + count - 1 to the row at `sum`. By one warp.
  CK_DEVICE void add_up(int first, int count, float* sum) const {
#pragma unroll 1
    for (int at = threadIdx.x % 32; at < row_pitch(); at += 32)
      for (int i = 0; i < count; ++i) sum[at] += row(first + i)[at];
    __syncwarp();
  }

 private:
  // Softmax of the logits of position t. What is not a number is left out of the maximum, and makes the sum one.
  CK_DEVICE void normalize(const Problem& p, int64_t t, float* filter) const {
    int first = 0, last = taps;  // the taps that have a share
    if (p.renormalize) {
      const Sequence sequence = sequence_of(p, t);
      if (p.state == nullptr) first = static_cast<int>(p.taps.first_inside(t, sequence.begin));
      last = static_cast<int>(p.taps.last_inside(t, sequence.end));
    }
    float highest = -infinity<float>(), total = 0;
#pragma unroll 4
    for (int j = first; j < last; ++j) highest = fmaxf(highest, filter[j]);
#pragma unroll 4
    for (int j = first; j < last; ++j) total += filter[j] = exponential(filter[j] - highest);
    const float inverse = 1 / total;
#pragma unroll 4
    for (int j = first; j < last; ++j) filter[j] *= inverse;
#pragma unroll 1
    for (int j = 0; j < first; ++j) filter[j] = 0;
#pragma unroll 1
    for (int j = last; j < taps; ++j) filter[j] = 0;
  }
};

}  // namespace ck::cuda
