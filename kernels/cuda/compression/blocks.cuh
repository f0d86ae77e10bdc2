// What the compression kernels share: scales, and a pass over blocks that computes them.
#pragma once
#include "bt_device.cuh"

namespace {

constexpr int LANES = 64;   // of the sum over a block
constexpr int TILE = 4096;  // elements that a CUDA block has in shared memory
constexpr int WARPS = THREADS / 32;

inline bool are_blocks(int64_t n, int64_t block, int scale_dtype = BT_FP32) {
  return n >= 0 && block > 0 && block % LANES == 0 &&
         (scale_dtype == BT_FP32 || scale_dtype == BT_BF16);
}

// Scales as they are on the wire. Both dtypes in one kernel: there is one scale for many elements.
struct Scales {
  void *at;
  int dtype;

  __device__ float get(int64_t i) const {
    return dtype == BT_FP32 ? static_cast<const float *>(at)[i]
                            : to_float(static_cast<const bf16 *>(at)[i]);
  }
  // Returns the scale of block i as it is kept: rounded, and NaN if that is not finite. One thread
  // writes it.
  __device__ float put(int64_t i, float s, bool writes) const {
    s = dtype == BT_FP32 ? s : rounded<bf16>(s);
    if (!is_finite(s)) s = __uint_as_float(0x7fc00000);
    if (!writes) return s;
    if (dtype == BT_FP32) static_cast<float *>(at)[i] = s;
    else static_cast<bf16 *>(at)[i] = from_float<bf16>(s);
    return s;
  }
};

// What several ranks sent: bits or codes, and scales; rows that are a stride of bytes apart.
struct Sources {
  int64_t count;
  const uint8_t *bytes;
  int64_t bytes_stride;
  const void *scales;
  int64_t scales_stride;
  int scale_dtype;

  __device__ const uint8_t *bytes_of(int64_t source) const { return bytes + source * bytes_stride; }
  __device__ Scales scales_of(int64_t source) const {
    const char *const row = static_cast<const char *>(scales) + source * scales_stride;
    return {const_cast<char *>(row), scale_dtype};
  }
};

// A thread's two of 64 sums; a warp has all. total(): halves added to each other.
struct Sum {
  float low = 0.0f, high = 0.0f;

  __device__ void add(float a, float b) {
    low = low + a;
    high = high + b;
  }
  __device__ float total() const { return warp_sum(low + high); }
};

// The largest of what is given; NaN if one is.
struct Largest {
  float most = 0.0f;

  __device__ void add(float a, float b) { most = Max{}(Max{}(most, a), b); }
  __device__ float total() const { return warp_max(most); }
};

// The compression blocks of a CUDA block: several small ones that fit into a tile, or a large one
// that is gone through tile by tile.
struct Share {
  int64_t first, size;  // elements
  int64_t block;
  int tile;  // elements of a tile: whole blocks, or a part of one

  __device__ Share(int64_t n, int64_t block, int64_t per_share)
      : first(blockIdx.x * per_share),
        size(n - first < per_share ? n - first : per_share),
        block(block),
        tile(per_share < TILE ? int(per_share) : TILE) {}

  __device__ int64_t num_blocks() const { return (size + block - 1) / block; }
  __device__ int at(int64_t offset) const { return size - offset < tile ? int(size - offset) : tile; }
};

// (host) Elements of a share, and how many shares there are.
inline int64_t share_of(int64_t block) { return block < TILE ? TILE / block * block : block; }
inline unsigned shares_of(int64_t n, int64_t block) {
  return unsigned((n + share_of(block) - 1) / share_of(block));
}

// What load(i, count, value) gives for the packs of a tile that begins at `begin`, to shared memory.
// All is loaded when it returns.
template <typename Load>
__device__ void fill(float *tile, int64_t begin, int count, Load load) {
  for (int k = threadIdx.x * PACK; k < count; k += THREADS * PACK) {
    float value[PACK];
    load(begin + k, count - k < PACK ? count - k : PACK, value);
    store_pack(tile + k, PACK, true, value);
  }
  __syncthreads();
}

// For every block b: what `Total` makes of measure(v) over its values v, then
// s = scale_of(b, total, elements, writes), called by the lanes of a warp, of which one writes; then
// keep(i, count, values, s) for its packs. Values of elements that are not there are zero. A large
// block is loaded twice.
template <typename Total, typename Load, typename Measure, typename ScaleOf, typename Keep>
__device__ void scale_blocks(const Share &share, Load load, Measure measure, ScaleOf scale_of,
                             Keep keep) {
  __shared__ __align__(16) float tile[TILE];
  __shared__ float scale[TILE / LANES];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t block = share.block;
  const int stretch = block < share.tile ? int(block) : share.tile;  // of one block in a tile

  Total mine;
  for (int64_t offset = 0; offset < share.size; offset += share.tile) {
    const int count = share.at(offset);
    fill(tile, share.first + offset, count, load);
    for (int begin = warp * stretch; begin < count; begin += WARPS * stretch) {
      const int end = begin + stretch < count ? begin + stretch : count;
      for (int k = begin + lane; k < end; k += LANES)
        mine.add(measure(tile[k]), k + 32 < end ? measure(tile[k + 32]) : 0.0f);
      if (block > share.tile && offset + count < share.size) continue;  // it goes on
      const int64_t b = (share.first + offset + begin) / block;
      const int64_t elements = block > share.tile ? share.size : end - begin;
      const float s = scale_of(b, mine.total(), elements, lane == 0);
      if (lane == 0) scale[begin / stretch] = s;
      mine = Total{};
    }
    __syncthreads();
  }

  // From here on a thread has to do with its own packs of the tile alone.
  for (int64_t offset = 0; offset < share.size; offset += share.tile) {
    const int count = share.at(offset);
    if (share.size > share.tile) fill(tile, share.first + offset, count, load);
    for (int k = threadIdx.x * PACK; k < count; k += THREADS * PACK) {
      float value[PACK];
      load_pack(tile + k, PACK, true, value);
      keep(share.first + offset + k, count - k < PACK ? count - k : PACK, value,
           scale[k / stretch]);
    }
  }
}

}  // namespace
