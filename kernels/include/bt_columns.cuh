// What CUDA kernels on rows share: threads that own columns and walk through rows, sums of columns.
#pragma once
#include "bt_device.cuh"

namespace {

// (host) Whether packs of rows that are `stride` elements apart are aligned if their start is.
template <typename T> bool rows_can_pack(int64_t stride) { return stride * sizeof(T) % 16 == 0; }

// -- walking: a thread has a pack of columns, and every num_walkers-th row -------------------------

struct Walk {
  dim3 grid, threads;
  int num_walkers() const { return int(grid.y * threads.y); }
};

// (host) The number of walkers depends on nothing but rows and cols.
inline Walk walk(int64_t rows, int64_t cols, int64_t rows_each) {
  const int64_t packs = (cols + PACK - 1) / PACK;
  unsigned x = 1;
  while (x < packs && x < THREADS) x *= 2;
  const unsigned y = THREADS / x;
  int64_t walkers = (rows + rows_each - 1) / rows_each;
  walkers = walkers < 1024 ? (walkers > 1 ? walkers : 1) : 1024;
  return {dim3(unsigned((packs + x - 1) / x), unsigned((walkers + y - 1) / y)), dim3(x, y)};
}

// body(row, i, count) for the columns [i, i + count) of this thread, and its rows in order.
template <typename Body> __device__ inline void walk_rows(int64_t rows, int64_t i, int count,
                                                          Body body) {
  const int64_t walker = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  const int64_t num_walkers = int64_t(gridDim.y) * blockDim.y;
  if (count > 0)
    for (int64_t row = walker; row < rows; row += num_walkers) body(row, i, count);
}

__device__ inline int64_t my_column() {
  return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
}

__device__ inline int columns_left(int64_t cols, int64_t i) {
  return cols - i < PACK ? (cols > i ? int(cols - i) : 0) : PACK;
}

// -- sums of columns -------------------------------------------------------------------------------

constexpr int SUM_COLUMNS = 32, SUM_GROUPS = 8;

// out[i] = the sum over chunks of part[chunk * stride + i]: group g adds chunks g, g + 8, ... in
// order, then groups are added in order.
__global__ void __launch_bounds__(SUM_COLUMNS *SUM_GROUPS)
    add_chunks(int chunks, int64_t stride, int64_t cols, const float *part, float *out) {
  __shared__ float of_group[SUM_GROUPS][SUM_COLUMNS];
  const int64_t i = int64_t(blockIdx.x) * SUM_COLUMNS + threadIdx.x;
  float sum = 0.0f;
  if (i < cols)
    for (int chunk = threadIdx.y; chunk < chunks; chunk += SUM_GROUPS)
      sum += part[chunk * stride + i];
  of_group[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= cols) return;
  for (int group = 1; group < SUM_GROUPS; group++) sum += of_group[group][threadIdx.x];
  out[i] = sum;
}

// (host) The same; nothing if out is null.
inline void launch_add_chunks(int chunks, int64_t stride, int64_t cols, const float *part,
                              float *out, void *stream) {
  if (!out || cols == 0) return;
  const unsigned blocks = unsigned((cols + SUM_COLUMNS - 1) / SUM_COLUMNS);
  BT_LAUNCH(add_chunks, blocks, dim3(SUM_COLUMNS, SUM_GROUPS), 0, stream, chunks, stride, cols,
            part, out);
}

}  // namespace
