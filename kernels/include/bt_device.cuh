// What all CUDA kernels share: launching, dtypes, vectors of elements, sums over a warp or a block.
//
// A kernel file includes this and bt_abi.h, keeps its device code in an anonymous namespace, and
// defines functions of bt_abi.h. With -DCUDA_ON_CPU it compiles as C++ and runs on the CPU, for
// tests. Kernel bodies use nothing of the host's headers.
//
//   namespace {
//   template <typename T>
//   __global__ void scale(int64_t n, T *x, float factor, bool aligned) {
//     for_each_pack(n, [&](int64_t i, int count) {
//       float value[PACK];
//       load_pack(x + i, count, aligned, value);
//       for (int k = 0; k < PACK; k++) value[k] *= factor;
//       store_pack(x + i, count, aligned, value);
//     });
//   }
//   }  // namespace
//
//   BT_API int bt_scale(int64_t n, void *x, int dtype, float factor, int device, void *stream) {
//     if (n == 0) return BT_OK;
//     OnDevice on(device);
//     BT_DISPATCH(dtype, T, BT_LAUNCH(scale<T>, blocks_for(n), THREADS, 0, stream, n,
//                                     static_cast<T *>(x), factor, can_pack(x)));
//     return on.status();
//   }
#pragma once

#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <stdint.h>

#include "bt_abi.h"

namespace {

// -- launching ------------------------------------------------------------------------------------

// BT_LAUNCH(kernel<T>, grid, threads, shared_bytes, stream, arguments...): kernel<<<...>>>(...).
// A grid of 0 blocks is an error: return before it when there is nothing to do.
#define BT_LAUNCH(...) launch_kernel(__VA_ARGS__)

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
                   void *stream, Arguments... arguments) {
#ifdef CUDA_ON_CPU
  (void)stream;
  cuda_on_cpu::launch(kernel, grid, threads, shared_bytes, arguments...);
#else
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
}

// BT_DYN_SHARED(float, name): in a kernel, `float *name` is its dynamic shared memory.
#ifdef CUDA_ON_CPU
#define BT_DYN_SHARED(T, name) \
  T *const name = static_cast<T *>(cuda_on_cpu::block().dynamic_shared.data())
#else
#define BT_DYN_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char bt_dynamic_shared[]; \
  T *const name = reinterpret_cast<T *>(bt_dynamic_shared)
#endif

// While it lives, `device` is the current one; afterwards the one that was. status() is BT_OK, or
// the first error since it was made. Errors that others left behind are not ours to report.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetLastError();
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    switched_ = error_ == cudaSuccess;
  }
  ~OnDevice() {
    if (switched_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;

  bool failed() const { return error_ != cudaSuccess; }

  int status() {
    if (!failed()) error_ = cudaGetLastError();
    return failed() ? BT_CUDA_ERROR + static_cast<int>(error_) : static_cast<int>(BT_OK);
  }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool switched_ = false;
};

// -- dtypes ---------------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Runs the statements with T the storage type of `dtype`; in a function that returns a status. They
// may hold another BT_DISPATCH, for a second dtype.
#define BT_DISPATCH(dtype, T, ...)  \
  switch (dtype) {                  \
    case BT_FP32: {                 \
      using T = float;              \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case BT_BF16: {                 \
      using T = bf16;               \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case BT_FP16: {                 \
      using T = fp16;               \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    default:                        \
      return BT_BAD_ARGUMENT;       \
  }

// The same, of a tensor that may be null: then T is some type, and nothing is stored as it.
#define BT_DISPATCH_IF(tensor, dtype, T, ...) \
  BT_DISPATCH((tensor) ? (dtype) : static_cast<int>(BT_FP32), T, __VA_ARGS__)

// To float, exactly.
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }

// From float, to nearest even, as torch rounds: denormals are kept, too large is infinite. NaN is
// made the same on every machine.
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) {
  return x != x ? __ushort_as_bfloat16(0x7fc0) : __float2bfloat16_rn(x);
}
template <> __device__ inline fp16 from_float<fp16>(float x) {
  return x != x ? __ushort_as_half(0x7e00) : __float2half_rn(x);
}

// As it is after being stored as T.
template <typename T> __device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

__device__ inline bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// -- packs: neighbouring elements that a thread loads and stores at once --------------------------

constexpr int PACK = 8;       // elements of a pack, unless a kernel wants another number
constexpr int THREADS = 256;  // of a block, unless a kernel wants another number

// As stored. Its alignment makes the compiler access it in words of up to 16 bytes.
template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Stored {
  T element[N];
};

// (host) Whether packs may be accessed as words: all addresses are multiples of 16, or null.
template <typename... Pointers> bool can_pack(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// value = the first `count` elements of the N at `from`, as floats, and zeros. In words of up to 16
// bytes if all N are wanted and `aligned` (`from` is a multiple of 16 bytes, or of the whole pack).
template <typename T, int N>
__device__ inline void load_pack(const T *from, int count, bool aligned, float (&value)[N]) {
  if (aligned && count == N) {
    const Stored<T, N> stored = *reinterpret_cast<const Stored<T, N> *>(from);
#pragma unroll
    for (int k = 0; k < N; k++) value[k] = to_float(stored.element[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; k++) value[k] = k < count ? to_float(from[k]) : 0.0f;
  }
}

// The first `count` elements of the N at `to` = value, rounded to T.
template <typename T, int N>
__device__ inline void store_pack(T *to, int count, bool aligned, const float (&value)[N]) {
  if (aligned && count == N) {
    Stored<T, N> stored;
#pragma unroll
    for (int k = 0; k < N; k++) stored.element[k] = from_float<T>(value[k]);
    *reinterpret_cast<Stored<T, N> *>(to) = stored;
  } else {
#pragma unroll
    for (int k = 0; k < N; k++)
      if (k < count) to[k] = from_float<T>(value[k]);
  }
}

// (host) Blocks for which a thread has one pack, or several if there are very many.
inline unsigned blocks_for(int64_t n, int64_t per_block = THREADS * PACK) {
  const int64_t blocks = (n + per_block - 1) / per_block, most = 1 << 24;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// body(i, count) for the packs of this thread among n elements: those from i on, `count` of them
// (N, but for the last).
template <int N = PACK, typename Body> __device__ inline void for_each_pack(int64_t n, Body body) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x * N;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < n; i += stride)
    body(i, n - i < N ? static_cast<int>(n - i) : N);
}

// What an optimizer divides gradients by. A quotient by 1 is exact: null is no special case.
__device__ inline float divisor_of(const float *divisor) { return divisor ? *divisor : 1.0f; }

// -- sums and maxima over threads -----------------------------------------------------------------

struct Add {
  template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Max {  // NaN if one of them is
  template <typename T> __device__ T operator()(T a, T b) const { return a > b || a != a ? a : b; }
};

// Combines `value` over groups of `width` lanes (a power of 2); all 32 lanes call it, and all get
// the result. Halves are combined with each other: width / 2, ... 2, 1 apart.
template <typename T, typename Combine>
__device__ inline T warp_combine(T value, Combine combine, int width = 32) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2)
    if (apart < width) value = combine(value, __shfl_xor_sync(~0u, value, apart));
  return value;
}
template <typename T> __device__ inline T warp_sum(T value) { return warp_combine(value, Add{}); }
template <typename T> __device__ inline T warp_max(T value) { return warp_combine(value, Max{}); }

// The same over a one-dimensional block of whole warps; all its threads call it, and all get the
// result. The order does not depend on anything but the size of the block.
template <typename T, typename Combine>
__device__ inline T block_combine(T value, Combine combine, T neutral) {
  __shared__ T of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  value = warp_combine(value, combine);
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = warp_combine(lane < num_warps ? of_warp[lane] : neutral, combine);
  __syncthreads();  // of_warp is free for the next call
  return value;
}
template <typename T> __device__ inline T block_sum(T value) {
  return block_combine(value, Add{}, T(0));
}
// Of numbers that are not less than `least`.
template <typename T> __device__ inline T block_max(T value, T least) {
  return block_combine(value, Max{}, least);
}

}  // namespace
