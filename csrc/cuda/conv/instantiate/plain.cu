// For all types: little code for each.
#include "csrc/cuda/conv/families.h"
#include "csrc/cuda/conv/plain_backward.cuh"
#include "csrc/cuda/conv/serve.cuh"

namespace ck::cuda {

// Pieces of work beyond this number are taken by blocks that have finished others.
constexpr int64_t kMaxBlocks = 1 << 20;

inline dim3 blocks_for(int64_t items) { return dim3(static_cast<unsigned>(min(items, kMaxBlocks))); }

// Items of plain_forward and plain_input.
inline int64_t plain_items(const Problem& p) {
  return ceil_div(p.channels, 32) * ceil_div(PlainRuns(p).count, kPlainWarps * kPlainRuns) * p.batch;
}

// Bytes of the filters of 32 channels; 0 if they differ between positions, or are too long to lie in shared memory.
template <class T>
int64_t plain_filter_bytes(const Problem& p) {
  constexpr int64_t kBytes = 48 << 10;
  const int64_t heads = min(p.heads, min(int64_t{32}, ceil_div(int64_t{31}, p.head_channels()) + 1));
  const int64_t bytes = heads * plain_pitch(p.taps.taps) * static_cast<int64_t>(sizeof(Compute<T>));
  return p.per_row() || bytes > kBytes ? 0 : bytes;
}

template <class T>
const char* PlainFamily<T>::forward(const Forward& p, const Plan&, Stream stream) {
  const int64_t bytes = plain_filter_bytes<T>(p);
  return launch(p.finishes() ? plain_forward_finished<T> : plain_forward<T>, blocks_for(plain_items(p)),
                dim3(kPlainThreads), static_cast<size_t>(bytes), stream, p, bytes != 0);
}

template <class T>
const char* PlainFamily<T>::backward(const Backward& p, const Plan&, Stream stream) {
  const int64_t c_blocks = ceil_div(p.channels, 32), K = p.taps.taps, bytes = plain_filter_bytes<T>(p);
  const char* status = nullptr;
  const bool inputs = p.grad_x.data != nullptr || p.grad_gate.data != nullptr;
  if (p.statistics != nullptr && (inputs || p.grad_state != nullptr))
    status = launch(plain_statistics<T>, blocks_for(ceil_div(p.batch * p.time * p.heads, kPlainThreads)),
                    dim3(kPlainThreads), 0, stream, p);
  if (status == nullptr && inputs)
    status = launch(plain_input<T>, blocks_for(plain_items(p)), dim3(kPlainThreads), static_cast<size_t>(bytes), stream,
                    p, bytes != 0);
  if (status == nullptr && p.grad_state != nullptr)
    status = launch(plain_state<T>, blocks_for(c_blocks * ceil_div(p.batch * p.sequences * p.taps.span(), kPlainWarps)),
                    dim3(kPlainThreads), 0, stream, p);
  if (status == nullptr && p.grad_weight != nullptr) {
    if (p.per_row()) {
      constexpr int64_t kBytes = 96 << 10;  // of shared memory, or what one warp needs
      const int64_t warp_bytes = 2 * K * static_cast<int64_t>(sizeof(Compute<T>));
      const int64_t warps = max(int64_t{1}, min(int64_t{kPlainWarps}, kBytes / warp_bytes));
      const int64_t items = p.heads * (p.per_position ? p.batch * p.time : p.owners() * p.groups);
      status = launch(plain_weight_rows<T>, blocks_for(ceil_div(items, warps)), dim3(static_cast<unsigned>(32 * warps)),
                      static_cast<size_t>(warps * warp_bytes), stream, p);
      if (status == nullptr && !p.per_position) status = Reduce<Compute<T>>::weight(p, 1, true, stream);
    } else {
      status = launch(plain_weight<T>, blocks_for(c_blocks * ceil_div(K, kPlainTaps) * p.groups * p.owners()),
                      dim3(kPlainThreads), 0, stream, p);
      if (status == nullptr) status = Reduce<Compute<T>>::weight(p, p.head_channels(), false, stream);
    }
  }
  if (status == nullptr && p.grad_bias != nullptr) {
    const int64_t rows = p.owners() * p.groups;
    status = launch(plain_bias<T>, blocks_for(c_blocks * rows), dim3(kPlainThreads), 0, stream, p, rows);
    if (status == nullptr) status = Reduce<Compute<T>>::bias(p, rows, stream);
  }
  return status;
}

template <class T>
const char* PlainFamily<T>::step(const Step& p, const StepTiles& tiles, Stream stream) {
  const auto kernel = tiles.one ? cuda::step<T> : tiles.runs(p, tiles.time) ? serve<T, true> : serve<T, false>;
  return launch(kernel, dim3(tiles.blocks), dim3(static_cast<unsigned>(tiles.threads)),
                static_cast<size_t>(tiles.shared_bytes), stream, p, tiles);
}

template struct PlainFamily<float>;
template struct PlainFamily<double>;
template struct PlainFamily<bf16>;
template struct PlainFamily<f16>;

}  // namespace ck::cuda
