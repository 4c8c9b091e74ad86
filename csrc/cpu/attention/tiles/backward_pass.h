// The backward pass on tiles as a whole: its tasks, and what is left to do after them.
#pragma once

#include "csrc/cpu/attention/tiles/backward.h"

namespace ck::cpu::CK_ISA {

// Half a block of d(k) or d(v) from sums that are turned, and natural ones if given.
inline void write_turned(const HeadRows& to, const TiledData& d, int64_t b, int64_t g, int64_t first, const float* from,
                         float scale, const float* more) {
  if (to.data == nullptr) return;
  for (int64_t t = 0; t < d.width.sixteens; t += 2) {
    Words columns[2][16];
    for (int64_t n = 0; n < 2; ++n) transpose_words(from + (t + n) * kSums, 64, columns[n]);
    for (int64_t j = 0; j < min(16, d.p.keys - first); ++j) {
      Floats lower, upper;
      restore_order((Floats)columns[0][j] * scale, (Floats)columns[1][j] * scale, lower, upper);
      if (more != nullptr) {
        lower += load_floats(more + j * d.width.padded + t * 16);
        upper += load_floats(more + j * d.width.padded + t * 16 + 16);
      }
      RowOf(to, b, first + j, g).store(t * 16, d.width.channels - t * 16, to_bf16(lower, upper));
    }
  }
}

template <class Machine>
inline const char* tiled_attention_backward(const AttentionBackward& p) {
  const FlushDenormals flush;  // as in the tasks, which may do what is left to this function
  const TiledData data(p, true);
  const TiledTableSums tables(p, data);
  using Task = TiledBackwardTask<Machine>;
  const Splits splits(p.batch * p.groups, p.sharing() * Task::steps(data), min(32, 4 * p.batch * p.groups), 1);
  const int64_t tasks = splits.tasks(), size = data.width.factors(), half = data.key_blocks * size;
  const OrderedSums<float> key_sums(tasks, splits.per_group, Task::key_sums(data), false);
  const OrderedSums<float> table_sums(tasks, p.batch * splits.per_group, p.sharing() * tables.size, tables.shared);
  const float keep = p.dropout == 0.0 ? 1.0f : p.dropout < 1.0 ? static_cast<float>(1.0 / (1.0 - p.dropout)) : 0.0f;
  // sums(n): block k of each of the sums.
  const auto write_keys = [&](int64_t b, int64_t g, int64_t k, const auto& sums) {
    const float *const grad_k = sums(0), *const grad_v = sums(1);
    const float* const more = p.value_conv.data != nullptr ? sums(2) : nullptr;
    for (int64_t at = 0, first = k * kBlock; at < size; at += size / 2, first += 16) {
      write_turned(p.grad_k, data, b, g, first, grad_k + at, static_cast<float>(p.scale), nullptr);
      write_turned(p.grad_v, data, b, g, first, grad_v + at, keep, more == nullptr ? nullptr : more + at);
    }
  };
  const auto write_tables = [&](int64_t g, float* sums) {
    tables.write({g * p.sharing(), (g + 1) * p.sharing()},
                 [&](int64_t h) { return sums + h % p.sharing() * tables.size; });
  };
  parallel(p, tasks, data.threads, [&](int64_t begin, int64_t end) {
    Task task(p, data, tables);
    typename OrderedSums<float>::Runner keys(key_sums, begin, end), columns(table_sums, begin, end);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t pair = n / splits.per_group, b = pair % p.batch, g = pair / p.batch;
      float* const key_sum = keys.open(n);
      task.run(b, g, splits.of(n), columns.open(n), key_sum);
      if (const float* const sum = keys.close(n))
        for (int64_t k = 0; k < data.key_blocks; ++k)
          write_keys(b, g, k, [&](int64_t which) { return sum + which * half + k * size; });
      if (float* const sums = columns.close(n)) write_tables(g, sums);
    }
  });
  parallel(p, splits.groups * data.key_blocks, data.threads && splits.per_group > 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t group = n / data.key_blocks, k = n % data.key_blocks;
      if (key_sums.remaining(group, 0, 0) != nullptr)
        write_keys(group % p.batch, group / p.batch, k,
                   [&](int64_t which) { return key_sums.remaining(group, which * half + k * size, size); });
    }
  });
  if (tables.size == 0) return nullptr;
  for (int64_t g = 0; g < p.groups; ++g) {
    float* const sums = table_sums.remaining(g, 0, p.sharing() * tables.size);
    if (sums != nullptr && !tables.shared) write_tables(g, sums);
  }
  if (tables.shared)
    tables.write({0, p.heads}, [&](int64_t h) {
      return table_sums.remaining(h / p.sharing(), 0, 0) + h % p.sharing() * tables.size;
    });
  return nullptr;
}

}  // namespace ck::cpu::CK_ISA
