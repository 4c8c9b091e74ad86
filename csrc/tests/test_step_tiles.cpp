// How decoding steps are cut into blocks: everything once, within a block's means, for many shapes and devices.
#include <cstdint>

#include "csrc/cuda/conv/step_tiles.h"
#include "csrc/tests/check.h"

namespace {

using namespace ck::cuda;

const int64_t kIndex = 0;

// One position of each sequence, several, so many that sequences are cut, and packed sequences.
enum class Kind { kOne, kFew, kLong, kPacked };

template <class Body>
void for_each_step(Body body) {
  for (int64_t memory : {4096, 99 << 10, 227 << 10})
    for (int64_t batch : {1, 5, 33, 160, 1024, 9000})
      for (int64_t heads : {1, 3, 64, 512})
        for (int64_t channels : {1, 5, 64})
          for (int64_t taps : {1, 2, 7, 31, 3000})
            for (ck::Dtype dtype : {ck::Dtype::kBFloat16, ck::Dtype::kFloat32, ck::Dtype::kFloat64})
              for (bool own : {false, true})
                for (bool reordered : {false, true})
                  for (Kind kind : {Kind::kOne, Kind::kFew, Kind::kLong, Kind::kPacked}) {
                    if (reordered && kind == Kind::kPacked) continue;
                    Step p;
                    p.batch = kind == Kind::kPacked ? 1 : batch, p.heads = heads, p.channels = heads * channels;
                    p.time = kind == Kind::kOne ? 1 : kind == Kind::kFew ? 6 : 1000;
                    p.dtype = dtype, p.taps = {taps, taps - 1, 1}, p.per_position = own;
                    if (kind == Kind::kPacked) p.offsets = &kIndex;
                    p.states.sequences = batch;
                    p.states.width = taps - 1 + (kind == Kind::kFew ? 3 : 0);
                    p.states.pool = {nullptr, p.states.width * p.channels, p.channels, 1};
                    if (kind == Kind::kPacked) p.states.pool.time = 1, p.states.pool.channel = p.states.width;
                    if (reordered) p.states.source.data = &kIndex;
                    Device device;
                    device.block_memory = memory, device.memory = memory + 1024;
                    body(p, device, step_tiles(p, device));
                  }
}

}  // namespace

CK_TEST(blocks_have_everything_and_fit) {
  for_each_step([](const Step& p, const Device& device, const StepTiles& t) {
    const int64_t columns = (p.channels + t.width - 1) / t.width;
    CK_EQUAL(static_cast<int64_t>(t.blocks), columns * ((t.total + t.rows - 1) / t.rows));
    CK_EQUAL(t.threads > 0 && t.threads <= (t.one ? kStepThreads : kServeThreads) && t.threads % kStepUnit == 0, true);
    CK_EQUAL(kStepUnit % t.width, 0);
    CK_EQUAL(t.shared_bytes <= device.block_memory, true);
    CK_EQUAL(t.rows >= 1 && t.held >= 1 && t.held <= t.rows, true);
    // A block of a step that reorders rows has them all, and what is held of some is one row at a time.
    if (step_reorders(p)) CK_EQUAL(t.rows == p.states.sequences && t.time == p.time, true);
    CK_EQUAL(t.held == t.rows || t.depth == 1, true);
    CK_EQUAL(t.depth <= std::max<int64_t>(p.states.width, 1), true);
    // A state that is not held whole has a block of its own, and is copied by rows or number by number.
    if (!t.whole(p.states.width)) {
      CK_EQUAL(step_reorders(p) || t.rows == 1, true);
      CK_EQUAL(t.layout == StepLayout::kRun, false);
    }
  });
}

CK_TEST(pieces_have_all_positions) {
  for_each_step([](const Step& p, const Device&, const StepTiles& t) {
    // Only the first piece of a sequence reads its state.
    const bool packed = p.offsets != nullptr;
    if (packed || t.pieces > 1) {
      CK_EQUAL(t.time >= p.taps.span(), true);
      CK_EQUAL(t.rows <= kStepPieces && t.piece_bytes >= t.rows * static_cast<int64_t>(sizeof(StepPiece)), true);
    }
    if (!packed) {
      CK_EQUAL(t.time * t.pieces >= p.time && t.time * (t.pieces - 1) < p.time, true);
      CK_EQUAL(t.total, p.states.sequences * t.pieces);
      return;
    }
    // Wherever a boundary lies, every sequence has the pieces that it needs.
    for (int64_t at : {int64_t{0}, int64_t{1}, t.time - 1, t.time, t.time + 1, p.time - 1, p.time}) {
      if (at < 0 || at > p.time || p.states.sequences != 5) continue;
      const int64_t second = 1 + at / t.time;
      CK_EQUAL(second * t.time >= at && (t.total - p.states.sequences + 2 - second) * t.time >= p.time - at, true);
    }
  });
}

CK_TEST(filters_have_room) {
  for_each_step([](const Step& p, const Device&, const StepTiles& t) {
    int64_t most = 0;
    for (int64_t c = 0; c < p.channels; c += t.width) {
      const int64_t last = std::min(c + t.width, p.channels) - 1;
      most = std::max(most, last / p.head_channels() - c / p.head_channels() + 1);
    }
    const int64_t size = p.dtype == ck::Dtype::kFloat64 ? 8 : 4;
    const int64_t filters = most * (p.per_row() ? t.rows * t.time : 1);
    if (t.heads > 0) CK_EQUAL(t.heads >= most && t.filter_bytes >= filters * p.taps.taps * size, true);
  });
}

CK_TEST(short_states_of_few_rows_are_held_whole) {
  for_each_step([](const Step& p, const Device& device, const StepTiles& t) {
    if (p.states.sequences > 160 || p.taps.taps > 7 || device.block_memory <= 4096) return;
    CK_EQUAL(t.whole(p.states.width), true);
    CK_EQUAL(t.one, p.time == 1);
    if (!p.per_position) CK_EQUAL(t.heads > 0, true);
  });
}

CK_TEST(states_that_cannot_be_moved_up_are_held_whole) {
  Step p;
  p.batch = 160, p.time = 1, p.heads = 1, p.channels = 64, p.taps = {31, 30, 1}, p.dtype = ck::Dtype::kBFloat16;
  p.states.sequences = 160, p.states.width = 60, p.states.pool = {nullptr, 60 * 64, 64, 1};
  p.states.source.data = &kIndex;
  Device device;
  device.block_memory = 99 << 10, device.memory = 100 << 10;
  CK_EQUAL(step_tiles(p, device).whole(60), false);
  p.states.accepted.data = &kIndex;
  const StepTiles t = step_tiles(p, device);
  CK_EQUAL(t.whole(60) && t.width == 4, true);
}

CK_TEST_MAIN()
