// Numbers 16 bytes at a time, in the words of registers, and rows that can only be read in smaller pieces.
#pragma once

#include "csrc/cuda/device/device.h"
#include "csrc/cuda/device/numbers.cuh"

namespace ck::cuda {

// Elements of 16 bytes, and of a word.
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

CK_DEVICE void load_vector(uint32_t (&words)[4], const void* from) {
  const uint4 vector = *static_cast<const uint4*>(from);
  words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
}
CK_DEVICE void store_vector(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// The numbers of type T in these words, in the accumulation type, and back.
template <class T, int kWords>
CK_DEVICE void unpack(float* to, const uint32_t (&words)[kWords]) {
#pragma unroll
  for (int e = 0; e < kWords * kPerWord<T>; ++e) {
    if constexpr (sizeof(T) == 4)
      to[e] = __uint_as_float(words[e]);
    else
      to[e] = widen(T{static_cast<uint16_t>(words[e / 2] >> e % 2 * 16)});
  }
}
template <class T, int kWords>
CK_DEVICE void pack(uint32_t (&words)[kWords], const float* from) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if constexpr (sizeof(T) == 4)
      words[w] = __float_as_uint(from[w]);
    else
      words[w] = narrow_pair<T>(from[2 * w], from[2 * w + 1]);
  }
}

// The same with 16 bytes at `from`.
template <class T>
CK_DEVICE void unpack_vector(float* to, const T* from) {
  uint32_t words[4];
  load_vector(words, from);
  unpack<T>(to, words);
}

// Loads words of a row in pieces of `bytes`: the first `count` elements, which are whole pieces, and zeros.
template <class T, int kWords>
CK_DEVICE void load_pieces(uint32_t (&words)[kWords], const T* from, int count, int bytes) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = 0;
  if (kWords == 4 && bytes == 16) {
    if (count <= 0) return;
    const uint4 piece = *reinterpret_cast<const uint4*>(from);
    words[0] = piece.x, words[1] = piece.y, words[kWords - 2] = piece.z, words[kWords - 1] = piece.w;
  } else if (bytes >= 8) {
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      if (w * kPerWord<T> >= count) continue;
      const uint2 piece = *reinterpret_cast<const uint2*>(from + w * kPerWord<T>);
      words[w] = piece.x;
      words[w + 1 < kWords ? w + 1 : w] = piece.y;
    }
  } else if (bytes == 4) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      if (w * kPerWord<T> < count) words[w] = *reinterpret_cast<const uint32_t*>(from + w * kPerWord<T>);
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int e = 0; e < 2 * kWords; ++e)
      if (e < count) words[e / 2] |= uint32_t{from[e].bits} << e % 2 * 16;
  }
}

// Stores the first `count` elements, which are whole pieces.
template <class T, int kWords>
CK_DEVICE void store_pieces(T* to, const uint32_t (&words)[kWords], int count, int bytes) {
  if (kWords == 4 && bytes == 16) {
    if (count > 0) *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[kWords - 2], words[kWords - 1]);
  } else if (bytes >= 8) {
#pragma unroll
    for (int w = 0; w < kWords; w += 2)
      if (w * kPerWord<T> < count)
        *reinterpret_cast<uint2*>(to + w * kPerWord<T>) = make_uint2(words[w], words[w + 1 < kWords ? w + 1 : w]);
  } else if (bytes == 4) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      if (w * kPerWord<T> < count) *reinterpret_cast<uint32_t*>(to + w * kPerWord<T>) = words[w];
  } else if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int e = 0; e < 2 * kWords; ++e)
      if (e < count) to[e] = {static_cast<uint16_t>(words[e / 2] >> e % 2 * 16)};
  }
}

// Starts the copy of 16 bytes of a row to shared memory in pieces of `bytes`: the first `count` elements, which are
// whole pieces, and zeros. Two bytes are fewer than cp.async takes: these are loaded, and stored at once.
template <class T>
CK_DEVICE void stage_pieces(T* shared, const T* from, int count, int bytes) {
  if (bytes == 16) {
    cp_async<16>(shared, from, count > 0);
  } else if (bytes == 8) {
#pragma unroll
    for (int e = 0; e < kVector<T>; e += kVector<T> / 2) cp_async<8>(shared + e, from + e, e < count);
  } else if (bytes == 4) {
#pragma unroll
    for (int e = 0; e < kVector<T>; e += kPerWord<T>) cp_async<4>(shared + e, from + e, e < count);
  } else {
    uint32_t words[4];
    load_pieces(words, from, count, 2);
    store_vector(shared, words);
  }
}

}  // namespace ck::cuda
