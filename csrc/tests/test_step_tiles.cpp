// How decoding steps are cut into blocks: everything once, within a block's means, for many shapes and devices.
#include <cstdint>

#include "csrc/cuda/conv/step_tiles.h"
#include "csrc/tests/check.h"

namespace {

using namespace ck::cuda;

const int64_t kIndex = 0;

template <class Body>
void for_each_step(Body body) {
  for (int64_t memory : {4096, 99 << 10, 227 << 10})
    for (int64_t batch : {1, 5, 33, 160, 1024, 9000})
      for (int64_t heads : {1, 3, 64, 512})
        for (int64_t channels : {1, 5, 64})
          for (int64_t taps : {1, 2, 7, 31, 3000})
            for (ck::Dtype dtype : {ck::Dtype::kBFloat16, ck::Dtype::kFloat32, ck::Dtype::kFloat64})
              for (bool own : {false, true})
                for (bool reordered : {false, true}) {
                  Step p;
                  p.batch = batch, p.heads = heads, p.channels = heads * channels, p.dtype = dtype;
                  p.taps = {taps, taps - 1, 1}, p.per_position = own, p.state_row = reordered ? &kIndex : nullptr;
                  Device device;
                  device.block_memory = memory, device.memory = memory + 1024;
                  body(p, device, step_tiles(p, device));
                }
}

}  // namespace

CK_TEST(blocks_have_everything_and_fit) {
  for_each_step([](const Step& p, const Device& device, const StepTiles& t) {
    const int64_t columns = (p.channels + t.width - 1) / t.width;
    CK_EQUAL(static_cast<int64_t>(t.blocks), columns * ((p.batch + t.rows - 1) / t.rows));
    CK_EQUAL(t.threads > 0 && t.threads <= kStepThreads && t.threads % kStepUnit == 0, true);
    CK_EQUAL(kStepUnit % t.width, 0);
    CK_EQUAL(t.shared_bytes <= device.block_memory, true);
    CK_EQUAL(t.rows >= 1 && t.held >= 1 && t.held <= t.rows, true);
    // A block of a step that reorders rows has them all, and what is held of some is one row at a time.
    if (p.state_row != nullptr) CK_EQUAL(t.rows, p.batch);
    CK_EQUAL(t.held == t.rows || t.depth == 1, true);
    CK_EQUAL(t.depth <= p.taps.span(), true);
  });
}

CK_TEST(filters_have_room) {
  for_each_step([](const Step& p, const Device&, const StepTiles& t) {
    int64_t most = 0;
    for (int64_t c = 0; c < p.channels; c += t.width) {
      const int64_t last = std::min(c + t.width, p.channels) - 1;
      most = std::max(most, last / p.head_channels() - c / p.head_channels() + 1);
    }
    const int64_t size = p.dtype == ck::Dtype::kFloat64 ? 8 : 4, filters = most * (p.per_row() ? t.rows : 1);
    if (t.heads > 0) CK_EQUAL(t.heads >= most && t.filter_bytes >= filters * p.taps.taps * size, true);
  });
}

CK_TEST(short_states_of_few_rows_are_held_whole) {
  for_each_step([](const Step& p, const Device& device, const StepTiles& t) {
    if (p.batch > 160 || p.taps.taps > 7 || device.block_memory <= 4096) return;
    CK_EQUAL(t.whole(p.taps.span()), true);
    if (!p.per_position) CK_EQUAL(t.heads > 0, true);
  });
}

CK_TEST_MAIN()
