// The values of one group of heads as right operands by rows, and those of them that are not finite.
#pragma once

#include "csrc/cpu/attention/tiles/queries.h"

namespace ck::cpu::CK_ISA {

class TiledValues {
 public:
  explicit TiledValues(const TiledData& data)
      : d_(data), rows_(data.width.factors()), packed_(data.key_blocks * data.width.factors()) {}
  ~TiledValues() {
    delete nonfinite_;
    delete clean_;
  }
  TiledValues(const TiledValues&) = delete;
  TiledValues& operator=(const TiledValues&) = delete;

  // Whether the group is another than before.
  template <class Machine>
  bool load(Machine& m, int64_t b, int64_t g) {
    if (b == batch_ && g == group_) return false;
    batch_ = b;
    group_ = g;
    knows_nonfinite_ = false;
    Halves least = ~Halves{};
    for (int64_t n = 0; n < d_.key_blocks; ++n) {
      m.stay_awake();
      bf16* const to = packed_.get() + n * d_.width.factors();
      pack(d_.p.v, n, [&](const bf16* rows, int64_t pitch) {
        least = least_magnitudes(rows, pitch, d_.width, least);
        pack_by_rows(rows, pitch, d_.width, to);
      });
    }
    constexpr uint16_t kTiny = (127 - 60) << 7;
    tiny_ = false;
    for (int i = 0; i < 32; ++i) tiny_ = tiny_ || least[i] < kTiny;
    return true;
  }

  // Whether some are below 2^-60, whose products with small weights may be no numbers that float32 has.
  bool tiny() const { return tiny_; }

  // Calls body(rows, pitch) for block n of the keys or values, where they are if that will do.
  template <class Body>
  void pack(const HeadRows& t, int64_t n, const Body& body) {
    const uint32_t there = d_.keys_there(batch_, n);
    if (there == ~0u && d_.width.channels == d_.width.padded && t.channel == 1)
      return body(RowOf(t, batch_, n * kBlock, group_).data, t.time);
    read_rows(t, d_.width, batch_, group_, n * kBlock, there, rows_.get());
    body(rows_.get(), d_.width.padded);
  }

  // Blocks first .. end. clean: with zeros in place of rows that are not finite.
  const bf16* chunk(int64_t first, int64_t end, bool clean) {
    const bf16* const packed = packed_.get() + first * d_.width.factors();
    if (!clean) return packed;
    find_nonfinite();
    const int64_t size = (end - first) * d_.width.factors();
    delete clean_;
    clean_ = new Scratch<bf16>(size);
    memcpy(static_cast<void*>(clean_->get()), packed, static_cast<size_t>(size) * sizeof(bf16));
    for (int64_t j = first * kBlock; j < end * kBlock; ++j)
      for (int64_t c = 0; (*nonfinite_)[j] && c < d_.width.padded; ++c)
        (*clean_)[(j / kBlock - first) * d_.width.factors() + place_by_rows(j % kBlock, c / 16, c % 16)] = {0};
    return clean_->get();
  }

  // Adds the rows that are not finite to the sums of the queries that see them. weights: of blocks first .. end, as the
  // forward pass leaves them.
  void add_nonfinite(int64_t first, int64_t end, const TiledQueries& queries, const bf16* weights, float* out) const {
    for (int64_t j = first * kBlock; j < end * kBlock; ++j)
      for (int64_t r = 0; (*nonfinite_)[j] && r < queries.count; ++r) {
        if (!queries.sees(r, j)) continue;
        const int64_t block = j / kBlock, x = j % kBlock;
        const float weight = to_float(weights[(block - first) * 8 * kSums + r * 32 + 2 * (x % 16) + x / 16]);
        float* const to = out + r / 16 * d_.width.sixteens * kSums + r % 16 * 16;
        for (int64_t t = 0; t < d_.width.sixteens; ++t)
          for (int64_t c = 0; c < 16; ++c)
            to[t * kSums + c] += weight * to_float(packed_[block * d_.width.factors() + place_by_rows(x, t, c)]);
      }
  }

 private:
  void find_nonfinite() {
    if (knows_nonfinite_) return;
    if (nonfinite_ == nullptr) nonfinite_ = new Scratch<bool>(d_.key_blocks * kBlock);
    for (int64_t j = 0; j < d_.key_blocks * kBlock; ++j) {
      bool found = false;
      for (int64_t c = 0; c < d_.width.padded; ++c) {
        const bf16 v = packed_[j / kBlock * d_.width.factors() + place_by_rows(j % kBlock, c / 16, c % 16)];
        found = found || (v.bits & 0x7f80) == 0x7f80;
      }
      (*nonfinite_)[j] = found;
    }
    knows_nonfinite_ = true;
  }

  const TiledData& d_;
  Scratch<bf16> rows_, packed_;
  Scratch<bool>* nonfinite_ = nullptr;
  Scratch<bf16>* clean_ = nullptr;
  bool knows_nonfinite_ = false, tiny_ = false;
  int64_t batch_ = -1, group_ = -1;
};

}  // namespace ck::cpu::CK_ISA
