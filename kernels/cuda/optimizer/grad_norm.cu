// The sum of squares of many tensors. A block has a chunk, four threads a part of it: each holds 4
// of the 16 lanes, so that every lane adds in the order that bt_abi.h says, and what the threads of
// a part load at once is contiguous.
#include "bt_device.cuh"

namespace {

constexpr int LANES = 16, HELD = 4, TEAM = LANES / HELD;
constexpr int PART = 1024, PARTS = 64;
constexpr int64_t CHUNK = PART * PARTS;
static_assert(PARTS * TEAM == THREADS, "a block has a chunk");

// Tensors as kernel arguments, which are limited to 4 KB: no memory on the device is needed.
struct Batch {
  static constexpr int MOST = 128;
  void *tensor[MOST];
  int64_t size[MOST];
  unsigned first_chunk[MOST + 1];  // and behind the last
  int num_tensors;

  __device__ int tensor_of(unsigned chunk) const {
    int low = 0, high = num_tensors - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_chunk[middle] <= chunk) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

struct Result {
  double squares, not_finite;
};

// The lanes of a team, halves added to each other; every thread of the warp calls it.
__device__ double total_of_team(double (&lane)[HELD]) {
#pragma unroll
  for (int k = 0; k < HELD; k++) lane[k] = warp_combine(lane[k], Add{}, TEAM);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// The elements of a part that this thread has.
template <typename T, bool DIVIDE, bool WRITE> struct Part {
  T *x;
  float divisor;
  double lane[HELD] = {};
  int not_finite = 0;

  __device__ void add(int j, int count, bool aligned) {
    float value[HELD];
    load_pack(x + j, count, aligned, value);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      if (DIVIDE) value[k] = value[k] / divisor;
      if (k >= count) continue;
      not_finite += !is_finite(value[k]);
      lane[k] = lane[k] + double(value[k]) * double(value[k]);
    }
    if (WRITE) store_pack(x + j, count, aligned, value);
  }

  __device__ void add_all(int size, bool aligned) {
    int j = threadIdx.x % TEAM * HELD;
    if (size == PART && aligned) {
#pragma unroll 4
      for (; j < PART; j += LANES) add(j, HELD, true);
    } else {
      for (; j < size; j += LANES) add(j, size - j < HELD ? size - j : HELD, false);
    }
  }
};

template <typename T, bool DIVIDE, bool WRITE>
__global__ void __launch_bounds__(THREADS)
    sum_chunks(const __grid_constant__ Batch batch, const float *divisor, Result *results) {
  const int t = batch.tensor_of(blockIdx.x), part = threadIdx.x / TEAM;
  const int64_t begin = (blockIdx.x - batch.first_chunk[t]) * CHUNK + part * PART;
  const int64_t left = batch.size[t] - begin;
  T *const tensor = static_cast<T *>(batch.tensor[t]);

  Part<T, DIVIDE, WRITE> mine{tensor + begin, divisor_of(divisor)};
  mine.add_all(left < PART ? (left < 0 ? 0 : int(left)) : PART,
               reinterpret_cast<uintptr_t>(tensor) % 16 == 0);

  __shared__ double of_part[PARTS];  // of parts that are not there: 0
  const double total = total_of_team(mine.lane);
  if (threadIdx.x % TEAM == 0) of_part[part] = total;
  const int not_finite = block_sum(mine.not_finite);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  double lane = 0.0;
  for (int p = threadIdx.x % LANES; p < PARTS; p += LANES) lane = lane + of_part[p];
  const double of_chunk = warp_combine(lane, Add{}, LANES);
  if (threadIdx.x == 0) results[blockIdx.x] = {of_chunk, double(not_finite)};
}

// One block: the lanes wait for one addition after the other, and not for memory.
__global__ void __launch_bounds__(THREADS)
    sum_all(int64_t num_chunks, const Result *results, double *out) {
  constexpr int TILE = 2048;
  __shared__ double squares[TILE];
  double lane = 0.0, not_finite = 0.0;
  for (int64_t begin = 0; begin < num_chunks; begin += TILE) {
    const int size = num_chunks - begin < TILE ? int(num_chunks - begin) : TILE;
    for (int k = threadIdx.x; k < size; k += THREADS) {
      const Result result = results[begin + k];
      squares[k] = result.squares;
      not_finite = not_finite + result.not_finite;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
#pragma unroll 8
      for (int k = threadIdx.x % LANES; k < size; k += LANES) lane = lane + squares[k];
    }
    __syncthreads();
  }
  const double total = warp_combine(lane, Add{}, LANES);
  not_finite = block_sum(not_finite);
  if (threadIdx.x != 0) return;
  out[0] = total;
  out[1] = not_finite;
}

template <typename T>
void launch(const Batch &batch, const float *divisor, bool write, Result *results, void *stream) {
  const unsigned blocks = batch.first_chunk[batch.num_tensors];
  const auto kernel = !divisor ? sum_chunks<T, false, false>
                      : write  ? sum_chunks<T, true, true>
                               : sum_chunks<T, true, false>;
  BT_LAUNCH(kernel, blocks, THREADS, 0, stream, batch, divisor, results);
}

template <typename T>
int64_t launch_all(int64_t num_tensors, void *const *pointers, const int64_t *sizes,
                   const float *divisor, bool write, Result *results, void *stream) {
  int64_t num_chunks = 0;
  Batch batch = {};
  for (int64_t i = 0; i < num_tensors; i++) {
    if (sizes[i] > 0) {
      const int t = batch.num_tensors++;
      batch.tensor[t] = pointers[i];
      batch.size[t] = sizes[i];
      batch.first_chunk[t + 1] =
          batch.first_chunk[t] + unsigned((sizes[i] + CHUNK - 1) / CHUNK);
    }
    const bool last = i == num_tensors - 1;
    if (batch.num_tensors == 0 || (batch.num_tensors < Batch::MOST && !last)) continue;
    launch<T>(batch, divisor, write, results + num_chunks, stream);
    num_chunks += batch.first_chunk[batch.num_tensors];
    batch.num_tensors = 0;
  }
  return num_chunks;
}

}  // namespace

BT_API int bt_grad_norm(int64_t num_tensors, void *const *pointers, const int64_t *sizes, int dtype,
                        const float *divisor, int write, double *workspace, double *out,
                        int device, void *stream) {
  Result *const results = reinterpret_cast<Result *>(workspace);
  int64_t num_chunks = 0;
  OnDevice on(device);
  BT_DISPATCH(dtype, T, num_chunks = launch_all<T>(num_tensors, pointers, sizes, divisor,
                                                   write != 0, results, stream));
  BT_LAUNCH(sum_all, 1, THREADS, 0, stream, num_chunks, results, out);
  return on.status();
}
