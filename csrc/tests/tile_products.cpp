// Tiles and the arithmetic around them, by one compilation; CMake compiles this file once for each set of instructions.
#include "csrc/tests/tile_products.h"
#include "csrc/cpu/attention/tiles/operands.h"
#include "csrc/cpu/conv/tiles/bands.h"

namespace ck::cpu::CK_ISA {

namespace {

#if defined(__AMX_BF16__)
using Machine = AmxTiles;
#else
using Machine = EmulatedTiles;
#endif

void tile_product(const void* a, const void* b, void* c) {
  Machine m;
  m.load<0>(c, 64);
  m.load<1>(a, 64);
  m.load<2>(b, 64);
  m.dot<0, 1, 2>();
  m.store<0>(c, 64);
}

void functions(const float* x, float* out) {
  const FlushDenormals flush;
  const PowerSeries series(1.0f), small(0x1p-70f);
  const Floats v = load_floats(x), w = load_floats(x + 16), fraction = fraction_of(v);
  const Floats results[] = {fraction + 0.0f,  // the sign of 0 depends on the way it is found
                            scale_by_power(series(fraction), v),
                            scale_by_power(small(fraction), v),
                            log2_plus(v < Floats{} ? -v : v, splat(3.0f)),
                            fused(v, w, v),
                            square_root(v * v),
                            keep_lanes(0xa5c3, v),
                            (Floats)to_bf16(v * 1.0f, w * 1.0f),
                            (Floats)join_halves(rounded(v), rounded(w))};
  for (const Floats& result : results) {
    store_bytes(out, result);
    out += 16;
  }
}

// 32 rows of each matrix; all formats.
void products(const bf16* a, const bf16* b, int64_t channels, float* over_channels, float* over_rows) {
  Machine m;
  const Width width(channels);
  Scratch<bf16> left(width.factors()), right(width.factors()), packed(width.factors()), turned(width.factors());
  HeadRows rows{const_cast<bf16*>(a), 0, channels, 0, 1};
  read_rows(rows, width, 0, 0, 0, ~0u, left.get());
  rows.data = const_cast<bf16*>(b);
  read_rows(rows, width, 0, 0, 0, ~0u, right.get());
  pack_by_channels(right.get(), width.padded, width, packed.get());
  multiply_channels(m, width, left.get(), packed.get(), 1, over_channels, 0);
  pack_by_rows(left.get(), width.padded, width, packed.get());
  pack_turned(packed.get(), width, turned.get());
  pack_by_rows(right.get(), width.padded, width, packed.get());
  for (int64_t t = 0; t < width.sixteens; t += 2)
    for (int64_t u = 0; u < width.sixteens; u += 2) {
      const bf16 *const x = turned.get() + t * kFactors, *const y = packed.get() + u * kFactors;
      float *const upper = over_rows + (t * width.sixteens + u) * kSums, *const lower = upper + width.sixteens * kSums;
      multiply_block(m, true, 1, {x, x + kFactors, 64, 0}, {y, y + kFactors, 0},
                     {upper, upper + kSums, lower, lower + kSums});
    }
}

template <int kVectors>
bool band_of(const float* values, int64_t steps, bf16* to) {
  static_assert(kBandTerms == kTermsOfBands);
  Scratch<bf16> made(band_size(steps));
  memset(static_cast<void*>(made.get()), 0, static_cast<size_t>(band_size(steps)) * sizeof(bf16));
  Floats v[kVectors];
  TermRange range;
  for (int n = 0; n < kVectors; ++n) range.add(v[n] = load_floats(values + 16 * n));
  // Twice, as where a band takes the place of another.
  for (int64_t i = 0; i < 2 * kBandRows; ++i) write_band_row<kVectors>(v, i % kBandRows, steps, made.get());
  for (int64_t term = 0; term < kBandTerms; ++term)
    memcpy(static_cast<void*>(to + term * 512 * steps), made.get() + term * band_term_size(steps),
           static_cast<size_t>(1024 * steps));
  return range.holds(0xffff);
}
bool band(const float* values, int64_t taps, bf16* to) {
  const int64_t steps = band_steps(taps);
  return band_vectors(taps) == 2 ? band_of<2>(values, steps, to) : band_of<4>(values, steps, to);
}

}  // namespace

extern const TileTests kTests;
const TileTests kTests = {tile_product, functions, products, band};

}  // namespace ck::cpu::CK_ISA
