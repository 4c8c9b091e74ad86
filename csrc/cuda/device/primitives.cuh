// What kernels are written with: the one place of inline PTX, besides warpgroup.cuh for compute capability 9.0.
// Compiled by a host compiler with CK_SIMT, the same names stand for the versions of csrc/simt, which run on the CPU
// with one fiber per thread.
//
//   template <class T>
//   CK_GLOBAL(256, 2) void kernel(const CK_PARAM Problem p) {    at most 256 threads, at least 2 blocks per processor
//     char* tile = shared_memory();                              dynamic shared memory, aligned to 128 bytes
//     CK_SHARED(float, totals, 32);                              float totals[32] in static shared memory
//   }
//   launch(kernel<T>, grid, block, shared_bytes, stream, problem)
//
// Fragments, rows of matrices and masks are those of the PTX ISA. ldmatrix and mma need all 32 lanes.
#pragma once

#include "csrc/cuda/device/device.h"

#if defined(CK_SIMT)
#if defined(__CUDACC__)
#error "CK_SIMT is for host compilers"
#endif
#include "csrc/simt/primitives.h"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "csrc/common/dtypes.h"

#define CK_DEVICE __device__ __forceinline__
#define CK_PARAM __grid_constant__
#define CK_GLOBAL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define CK_SHARED(type, name, count) __shared__ type name[count]
// Where lanes leave out some passes: unrolled by a host compiler too, so that each is a place of its own when counted.
#define CK_UNROLL _Pragma("unroll")

namespace ck::cuda {

CK_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char ck_shared_memory[];
  return ck_shared_memory;
}

CK_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Writes zeros and reads nothing where `valid` does not hold. Both addresses are multiples of `Bytes` in either case.
template <int Bytes>
CK_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const uint32_t to = shared_address(shared);
  const size_t from = __cvta_generic_to_global(global);
  const int read = valid ? Bytes : 0;
  // Copies of 16 bytes bypass the first-level cache; shorter ones can only go through it.
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(Bytes), "r"(read)
                 : "memory");
}

// Four numbers in one instruction: nvcc 13.0 splits some assignments of a float4.
CK_DEVICE void store_four(float* global, float a, float b, float c, float d) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "f"(a), "f"(b),
               "f"(c), "f"(d)
               : "memory");
}

CK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the `Newest` last ones. Other threads see the data after a barrier.
template <int Newest>
CK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Newest) : "memory");
}

// mbarriers in shared memory, and bulk copies, of compute capability 9.0 and up. Where there are none, code that would
// use them stops the launch; ptxas refuses it in a file whose PTX for an older GPU serves all of them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CK_PTX_90(...) asm volatile(__VA_ARGS__)
#elif defined(CK_OLDEST_PTX)
#define CK_PTX_90(...) asm volatile("CMakeLists.txt names files that need PTX of their own;")
#else
#define CK_PTX_90(...) __trap()
#endif

// The bytes of copies that come in complete a phase, besides arrivals. Bulk copies may use an mbarrier after
// fence_mbarrier_init by the thread that has initialised it.
CK_DEVICE void mbarrier_init(uint64_t* mbarrier, unsigned arrivals) {
  CK_PTX_90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(arrivals) : "memory");
}
// The memory is free for anything then.
CK_DEVICE void mbarrier_invalidate(uint64_t* mbarrier) {
  CK_PTX_90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(mbarrier)) : "memory");
}
CK_DEVICE void mbarrier_arrive(uint64_t* mbarrier) {
  CK_PTX_90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(mbarrier)) : "memory");
}
CK_DEVICE void mbarrier_expect(uint64_t* mbarrier, unsigned bytes) {
  CK_PTX_90("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)),
            "r"(bytes) : "memory");
}
CK_DEVICE void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes) {
  CK_PTX_90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)),
            "r"(bytes) : "memory");
}
// Whether the phase of this parity is complete: 0 for the first, 1 for the next. Waits for some time.
CK_DEVICE bool mbarrier_try_wait(uint64_t* mbarrier, unsigned parity) {
  unsigned done = 0;
  CK_PTX_90(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(
          done) : "r"(shared_address(mbarrier)),
      "r"(parity) : "memory");
  return done != 0;
}
CK_DEVICE void fence_mbarrier_init() { CK_PTX_90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
// Before bulk copies read, or overwrite, what this thread has written to shared memory. The thread that starts them
// follows by a barrier.
CK_DEVICE void fence_async_proxy() { CK_PTX_90("fence.proxy.async.shared::cta;" :: : "memory"); }

// Addresses and sizes of bulk copies are multiples of 16 bytes. One thread copies for all.
CK_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier) {
  CK_PTX_90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(shared)),
            "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(mbarrier)) : "memory");
}
// Shared memory must stay as it is until bulk_wait_read of the same thread, before its end at the latest.
CK_DEVICE void bulk_store(void* global, const void* shared, unsigned bytes) {
  CK_PTX_90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
            "r"(shared_address(shared)), "r"(bytes) : "memory");
}
CK_DEVICE void bulk_commit() { CK_PTX_90("cp.async.bulk.commit_group;" :: : "memory"); }
// Waits for all groups of this thread but the `Newest` last ones, until they are stored, or read.
template <int Newest>
CK_DEVICE void bulk_wait() {
  CK_PTX_90("cp.async.bulk.wait_group %0;" ::"n"(Newest) : "memory");
}
template <int Newest>
CK_DEVICE void bulk_wait_read() {
  CK_PTX_90("cp.async.bulk.wait_group.read %0;" ::"n"(Newest) : "memory");
}

CK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
CK_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// x, which the compiler cannot know to be the same: what follows from it is not computed before a loop and kept in
// registers.
CK_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x to within 2 units in the last place; subnormal results are 0.
CK_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to within a unit in the last place; subnormal numbers are 0.
CK_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Conversions to 16-bit numbers, to nearest, ties to even, and back, by their bits. cuda_fp16.h and cuda_bf16.h have
// them too, and take longer to compile than everything else that most files include.
CK_DEVICE float widen_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
template <class T>
CK_DEVICE uint16_t narrow_bits(float value) {
  uint16_t bits;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// Of two at a time, the first in the low half.
template <class T>
CK_DEVICE uint32_t narrow_two(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// a b + c of two at a time.
template <class T>
CK_DEVICE uint32_t multiply_add_two(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

// d += a b, with a of 16 x 16 and b of 16 x 8 numbers of type T.
template <class T>
CK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, with a of 16 x 8 and b of 8 x 8 numbers of type TF32: float32, of whose bits the lowest 13 do not count.
CK_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Lets a kernel have so much dynamic shared memory: beyond 48 KB, of which static memory takes its part, it must be
// asked for.
cudaError_t allow_shared_memory(const void* kernel, size_t bytes);

// nullptr, or why the launch was refused. An error of the kernel itself appears later, as everywhere in CUDA.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
                   Arguments&&... arguments) {
  cudaError_t error = cudaSuccess;
  // No kernel has 16 KB of static memory.
  if (shared_bytes > 32 * 1024) error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  }
  if (error == cudaSuccess) return nullptr;
  // The error is reported here: it is cleared, so that a later call does not find it.
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace ck::cuda

#endif

namespace ck::cuda {

CK_DEVICE void mbarrier_wait(uint64_t* mbarrier, unsigned parity) {
  while (!mbarrier_try_wait(mbarrier, parity)) {
  }
}

}  // namespace ck::cuda
