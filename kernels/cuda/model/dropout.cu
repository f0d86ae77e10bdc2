// residual + dropout(x + bias) in one pass. Random numbers are computed where they are needed and
// never stored: Philox-4x32-10, https://doi.org/10.1145/2063384.2063405
#include "bt_device.cuh"

namespace {

// Elements that 16 neighbouring counters draw for. A thread has 8 of the counters, and so 4 packs
// of elements, each 16 behind the one before.
constexpr int GROUP = 64;

struct Shape { int64_t samples, outer, inner, full_inner, offset, cols; };
struct Dropping { uint32_t threshold; float keep_scale; };

// The four words of the counter (low, high, 0, 0).
__device__ inline void philox(uint64_t counter, uint64_t key, uint32_t (&word)[4]) {
  uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32);
  uint32_t c = 0, d = 0;
  uint32_t first = static_cast<uint32_t>(key), second = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p = uint64_t(a) * 0xd2511f53u, q = uint64_t(c) * 0xcd9e8d57u;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ first;
    c = static_cast<uint32_t>(p >> 32) ^ d ^ second;
    b = static_cast<uint32_t>(q);
    d = static_cast<uint32_t>(p);
    first += 0x9e3779b9u;
    second += 0xbb67ae85u;
  }
  word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

// Bit 8 w + k: whether element k of pack w is kept.
__device__ inline uint32_t draw(uint64_t first_counter, uint64_t key, uint32_t threshold) {
  uint32_t kept = 0;
#pragma unroll
  for (int k = 0; k < PACK; k++) {
    uint32_t word[4];
    philox(first_counter + k, key, word);
#pragma unroll
    for (int w = 0; w < 4; w++) kept |= (word[w] < threshold ? 0u : 1u) << (PACK * w + k);
  }
  return kept;
}

// `value` = elements [i, i + PACK) of a row of `inner`, of which the first may be outside of it.
template <typename T>
__device__ inline void load_part(const T *row, int64_t i, int64_t inner, bool aligned,
                                 float (&value)[PACK]) {
  if (i >= 0) return load_pack(row + i, inner - i < PACK ? int(inner - i) : PACK, aligned, value);
#pragma unroll
  for (int k = 0; k < PACK; k++)
    value[k] = i + k >= 0 && i + k < inner ? to_float(row[i + k]) : 0.0f;
}
template <typename T>
__device__ inline void store_part(T *row, int64_t i, int64_t inner, bool aligned,
                                  const float (&value)[PACK]) {
  if (i >= 0) return store_pack(row + i, inner - i < PACK ? int(inner - i) : PACK, aligned, value);
#pragma unroll
  for (int k = 0; k < PACK; k++)
    if (i + k >= 0 && i + k < inner) row[i + k] = from_float<T>(value[k]);
}

template <typename T>
__device__ inline void add_bias(const T *bias, int64_t i, int64_t cols, float (&value)[PACK]) {
  int64_t column = i < 0 ? 0 : i % cols;
#pragma unroll
  for (int k = 0; k < PACK; k++) {
    if (i + k < 0) continue;
    value[k] += to_float(bias[column]);
    if (++column == cols) column = 0;
  }
}

// A row is a stretch of a sample that is whole in x: element e of the sample is element
// e - o * full_inner - offset of row number o. `halves` of groups touch a row.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    dropout(Shape is, int64_t halves, const T *x, const T *bias, const T *residual,
            const int64_t *seeds, uint64_t salt, Dropping with, T *out, bool aligned) {
  const int64_t total = is.samples * is.outer * halves;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; unit < total; unit += stride) {
    const int64_t row = unit / halves, half = unit - row * halves, sample = row / is.outer;
    const int64_t begin = (row - sample * is.outer) * is.full_inner + is.offset;
    const int64_t group = begin / GROUP + half / 2, within = half % 2 * PACK;
    const int64_t first = group * GROUP + within - begin;  // of this thread, in the row
    if (first >= is.inner) continue;
    const uint32_t kept =
        draw(group * 16 + within, static_cast<uint64_t>(seeds[sample]) + salt, with.threshold);
    const int64_t start = row * is.inner;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const int64_t i = first + 16 * w;
      if (i <= -PACK || i >= is.inner) continue;
      const bool packs = aligned && (start + i) % PACK == 0;
      float value[PACK], more[PACK];
      load_part(x + start, i, is.inner, packs, value);
      if (bias) add_bias(bias, i, is.cols, value);
#pragma unroll
      for (int k = 0; k < PACK; k++)
        value[k] = kept >> (PACK * w + k) & 1u ? value[k] * with.keep_scale : 0.0f;
      if (residual) {
        load_part(residual + start, i, is.inner, packs, more);
#pragma unroll
        for (int k = 0; k < PACK; k++) value[k] += more[k];
      }
      store_part(out + start, i, is.inner, packs, value);
    }
  }
}

}  // namespace

int bt_bias_dropout_residual(int64_t samples, int64_t outer, int64_t inner, int64_t full_inner,
                             int64_t offset, int64_t cols, const void *x, const void *bias,
                             const void *residual, const int64_t *seeds, int64_t salt,
                             uint32_t threshold, float keep_scale, void *out, int dtype, int device,
                             void *stream) {
  if (samples == 0 || outer == 0 || inner == 0) return BT_OK;
  if (bias && (cols <= 0 || inner % cols)) return BT_BAD_ARGUMENT;
  Shape is = {samples, outer, inner, full_inner, offset, cols};
  if (inner == full_inner) is = {samples, 1, outer * inner, outer * inner, 0, cols};
  // A row that begins inside of a group touches one group more than it fills.
  const int64_t whole = is.outer == 1 && is.offset % GROUP == 0;
  const int64_t halves = 2 * ((is.inner + GROUP - 1) / GROUP + (whole ? 0 : 1));
  const bool aligned = can_pack(x, residual, out);
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
      BT_LAUNCH(dropout<T>, blocks_for(is.samples * is.outer * halves, THREADS), THREADS, 0, stream,
                is, halves, static_cast<const T *>(x), static_cast<const T *>(bias),
                static_cast<const T *>(residual), seeds, static_cast<uint64_t>(salt),
                Dropping{threshold, keep_scale}, static_cast<T *>(out), aligned));
  return on.status();
}
