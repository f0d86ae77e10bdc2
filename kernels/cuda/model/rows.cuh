// Rows shared out to groups of threads: a warp a row while rows are short, else a block a row.
#pragma once
#include "bt_device.cuh"

namespace {

constexpr float LOWEST = -3.402823466e38f;
constexpr int SHORT = 1024;  // columns up to which a warp has a row

// What happens in a group of SIZE threads: 32 or THREADS. All its threads call these, and all get
// the result. Threads of a group have packs of a row in turns.
template <int SIZE> struct Group {
  static constexpr int PER_BLOCK = THREADS / SIZE;

  __device__ static int thread() { return threadIdx.x % SIZE; }
  __device__ static int64_t row() {
    return int64_t(blockIdx.x) * PER_BLOCK + threadIdx.x / SIZE;
  }
  __device__ static int64_t stride() { return int64_t(gridDim.x) * PER_BLOCK; }

  __device__ static float sum(float value) {
    if constexpr (SIZE == 32) return warp_sum(value);
    else return block_sum(value);
  }
  // NaN is passed over.
  __device__ static float max(float value) {
    if constexpr (SIZE == 32) return warp_max(value);
    else return block_max(value, LOWEST);
  }

  // body(i, count) for the packs of this thread among `cols` elements.
  template <typename Body> __device__ static void packs(int64_t cols, Body body) {
    for (int64_t i = thread() * PACK; i < cols; i += SIZE * PACK)
      body(i, cols - i < PACK ? static_cast<int>(cols - i) : PACK);
  }
};

// The maximum and the sum of exp(x - most) of what a thread saw, in one pass. Of nothing, or of
// only -inf, most is the lowest number and total is 0. NaN and +inf make total NaN.
struct Online {
  float most = LOWEST, total = 0.0f;

  __device__ void add(const float (&x)[PACK], int count) {
    float now = most;
#pragma unroll
    for (int k = 0; k < PACK; k++)
      if (k < count) now = fmaxf(now, x[k]);
    total *= expf(most - now);
#pragma unroll
    for (int k = 0; k < PACK; k++)
      if (k < count) total += expf(x[k] - now);
    most = now;
  }

  // That of all threads of the group.
  template <typename G> __device__ void combine() {
    const float now = G::max(most);
    total = G::sum(total * expf(most - now));
    most = now;
  }
};

}  // namespace

// (host) Launches kernel<Group<...>, arguments of the template...> with a group a row.
#define BT_LAUNCH_ROWS(rows, cols, kernel, T, stream, ...)                                        \
  if ((cols) <= SHORT) {                                                                          \
    BT_LAUNCH((kernel<Group<32>, T>), blocks_for(rows, Group<32>::PER_BLOCK), THREADS, 0, stream, \
              __VA_ARGS__);                                                                       \
  } else {                                                                                        \
    BT_LAUNCH((kernel<Group<THREADS>, T>), blocks_for(rows, 1), THREADS, 0, stream, __VA_ARGS__); \
  }
