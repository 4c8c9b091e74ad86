// The types and built-in variables of CUDA that kernels use, for a host compiler.
#pragma once

// Where accesses are counted, what is assigned to a vector is one of them, also if it is given member by member.
#if defined(CK_COUNTED)
#define CK_WHOLE(type)                            \
  type& operator=(const type& other) {            \
    __builtin_memcpy(this, &other, sizeof(type)); \
    return *this;                                 \
  }
#else
#define CK_WHOLE(type)
#endif

struct alignas(8) float2 {
  float x, y;
  CK_WHOLE(float2)
};
struct alignas(16) float4 {
  float x, y, z, w;
  CK_WHOLE(float4)
};
struct alignas(8) uint2 {
  unsigned x, y;
  CK_WHOLE(uint2)
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
  CK_WHOLE(uint4)
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;
