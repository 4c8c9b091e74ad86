// Matrix tiles of 16 rows of 64 bytes, as x86's AMX has them: by its instructions, and by C++ that gives the same bits
// on machines without them.
//
// A machine has eight tiles. dot<C, A, B> adds to C[m][n], float32, the sum over k < 16 of A[m][2k] B[k][2n] +
// A[m][2k+1] B[k][2n+1], bfloat16: a row of A holds 32 numbers, a row of B the pairs of two rows of a matrix.
//
// What AMX computes was found by comparing it with this emulation over random bits. Each element has two chains, one of
// the even and one of the odd members of the pairs; both begin at +0 and take k in ascending order by
// chain = fma(a, b, chain). Then C = C + (even + odd). Every step rounds once, to the nearest, ties to even. Inputs
// that are denormal count as zeros of their sign, and so do results that are below 2^-126 once they are rounded to 24
// bits. MXCSR is neither read nor written. Of several NaN the first of a, b, chain reaches the result, that of `even`
// before that of `odd`, that of C before that of the sum; it is made quiet. Where there was none, the result is
// 0xffc00000.
#pragma once

#include "csrc/cpu/simd.h"

namespace ck::cpu::CK_ISA {

// Results of vector instructions that would be denormal are zeros, and so are denormal inputs, as for tiles.
class FlushDenormals {
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#else
  FlushDenormals() {}
#endif
};

class EmulatedTiles {
 public:
  EmulatedTiles() = default;
  EmulatedTiles(const EmulatedTiles&) = delete;
  EmulatedTiles& operator=(const EmulatedTiles&) = delete;

  template <int T>
  void zero() {
    memset(tile_[T], 0, sizeof tile_[T]);
  }
  template <int T>
  void load(const void* rows, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r) memcpy(tile_[T] + 64 * r, static_cast<const char*>(rows) + r * row_bytes, 64);
  }
  template <int T>
  void stream(const void* rows, int64_t row_bytes) {
    load<T>(rows, row_bytes);
  }
  template <int T>
  void store(void* rows, int64_t row_bytes) const {
    for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(rows) + r * row_bytes, tile_[T] + 64 * r, 64);
  }
  template <int C, int A, int B>
  void dot() {
    dot(tile_[C], tile_[A], tile_[B]);
  }
  void stay_awake() {}

  // One element: row a of 32 numbers, column n of b.
  static uint32_t element(uint32_t c, const char* a, const char* b, int n) {
    uint32_t chain[2] = {0, 0};
    for (int k = 0; k < 16; ++k)
      for (int e = 0; e < 2; ++e) {
        const uint32_t x = widened(a + 4 * k + 2 * e), y = widened(b + 64 * k + 4 * n + 2 * e);
        chain[e] = first_nan(x, y, chain[e], fused(number(x), number(y), number(chain[e])));
      }
    const uint32_t sum = first_nan(chain[0], chain[1], 0, number(chain[0]) + number(chain[1]));
    c = flushed(c);
    return first_nan(c, sum, 0, number(c) + number(sum));
  }

 private:
  static uint32_t bits(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return u;
  }
  static float number(uint32_t u) {
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  static uint32_t flushed(uint32_t u) { return (u & 0x7f800000u) == 0 ? u & 0x80000000u : u; }
  static uint32_t widened(const char* p) {
    uint16_t half;
    __builtin_memcpy(&half, p, 2);
    return flushed(static_cast<uint32_t>(half) << 16);
  }
  static bool is_nan(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u; }
  static uint32_t first_nan(uint32_t x, uint32_t y, uint32_t z, float result) {
    for (const uint32_t u : {x, y, z})
      if (is_nan(u)) return u | 0x400000u;
    const uint32_t u = flushed(bits(result));
    return is_nan(u) ? 0xffc00000u : u;
  }
  // The least normal number may come from below, where the result is 0.
  static float fused(float a, float b, float c) {
    const float result = __builtin_fmaf(a, b, c);
    const bool least = (bits(result) & 0x7fffffffu) == 0x00800000u;
    if (least && __builtin_fabsf(__builtin_fmaf(a * 0x1p64f, b * 0x1p64f, c * 0x1p64f * 0x1p64f)) < 0x1p2f)
      return number(bits(result) & 0x80000000u);
    return result;
  }

#if defined(__AVX2__) && defined(__FMA__)
  // Flushing denormals is for vectors what it is for tiles; elements that are NaN are found one by one.
  static void dot(char* c, const char* a, const char* b) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    alignas(32) float right[2][16][16];
    for (int k = 0; k < 16; ++k)
      for (int h = 0; h < 2; ++h) {
        const auto pair = load_bytes<__m256i>(b + 64 * k + 32 * h);
        _mm256_store_ps(right[0][k] + 8 * h, (__m256)_mm256_slli_epi32(pair, 16));
        _mm256_store_ps(right[1][k] + 8 * h, (__m256)_mm256_and_si256(pair, _mm256_set1_epi32(0xffff0000)));
      }
    for (int m = 0; m < 16; ++m) {
      __m256 chain[2][2] = {};
      for (int k = 0; k < 16; ++k) {
        const auto pair = load_bytes<uint32_t>(a + 64 * m + 4 * k);
        const __m256 left[2] = {_mm256_set1_ps(number(pair << 16)), _mm256_set1_ps(number(pair & 0xffff0000u))};
        CK_UNROLL for (int e = 0; e < 2; ++e) {
          CK_UNROLL for (int h = 0; h < 2; ++h) chain[e][h] =
              _mm256_fmadd_ps(left[e], _mm256_load_ps(right[e][k] + 8 * h), chain[e][h]);
        }
      }
      for (int h = 0; h < 2; ++h) {
        char* const to = c + 64 * m + 32 * h;
        const auto old = load_bytes<__m256>(to);
        const __m256 sum = _mm256_add_ps(old, _mm256_add_ps(chain[0][h], chain[1][h]));
        store_bytes(to, sum);
        const int nan = _mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q));
        for (int n = 0; nan >> n != 0; ++n)
          if (nan >> n & 1) store_bytes(to + 4 * n, element(bits(old[n]), a + 64 * m, b, 8 * h + n));
      }
    }
    _mm_setcsr(before);
  }
#else
  static void dot(char* c, const char* a, const char* b) {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        char* const to = c + 64 * m + 4 * n;
        store_bytes(to, element(load_bytes<uint32_t>(to), a + 64 * m, b, n));
      }
  }
#endif

  alignas(64) char tile_[8][1024];
};

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
// The instructions. The process has been given the permission to use them (dispatch.cpp). The compiler's own functions
// for them are not used: those of GCC 12 that load do not say that they read memory, and stores may sink below them.
class AmxTiles {
 public:
  AmxTiles() {
    static constexpr Shape kAll{};
    asm volatile("ldtilecfg %0" : : "m"(kAll) : "memory");
  }
  ~AmxTiles() { asm volatile("tilerelease" : : : "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int T>
  CK_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  CK_INLINE void load(const void* rows, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(row_bytes), "i"(T) : "memory");
  }
  // With the hint that the rows will not be read again soon.
  template <int T>
  CK_INLINE void stream(const void* rows, int64_t row_bytes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int T>
  CK_INLINE void store(void* rows, int64_t row_bytes) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  CK_INLINE void dot() {
    static_assert(C != A && C != B && A != B);
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  // 2000 cycles after the last product the unit falls asleep, and takes 1000 to wake. Spoils tile 0.
  CK_INLINE void stay_awake() { dot<0, 4, 6>(); }

 private:
  struct alignas(64) Shape {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
};
#endif

}  // namespace ck::cpu::CK_ISA
