// Softmax of scaled scores over the keys that are allowed. A row is read twice, the second time
// from a cache, and written once.
#include "rows.cuh"

namespace {

struct Scores { int64_t heads, queries, keys; };
struct Mask {
  const uint8_t *bytes;
  int64_t batch_stride, head_stride, query_stride;
};

// t = elements [i, i + count) of a row, times the sign of the scale. Bit k: whether element k of
// them is allowed.
template <typename T>
__device__ inline uint32_t load_scores(const T *row, const uint8_t *mask, int64_t i, int count,
                                       bool aligned, bool negative, float (&t)[PACK]) {
  uint32_t allowed = 0;
  load_pack(row + i, count, aligned, t);
#pragma unroll
  for (int k = 0; k < PACK; k++) {
    if (negative) t[k] = -t[k];
    if (k < count && (!mask || mask[i + k])) allowed |= 1u << k;
  }
  return allowed;
}

template <typename G, typename T>
__global__ void __launch_bounds__(THREADS, 4)
    forward(int64_t rows, Scores is, const T *x, float scale, bool causal, Mask mask, T *y,
            bool aligned) {
  const float size = fabsf(scale);
  const bool negative = scale < 0.0f;
  for (int64_t row = G::row(); row < rows; row += G::stride()) {
    const int64_t head = row / is.queries, t = row - head * is.queries;
    const int64_t last = causal ? t + is.keys - is.queries + 1 : is.keys;
    const int64_t limit = last < 0 ? 0 : last < is.keys ? last : is.keys;
    const T *from = x + row * is.keys;
    T *to = y + row * is.keys;
    const uint8_t *bytes = mask.bytes;
    if (bytes)
      bytes += head / is.heads * mask.batch_stride + head % is.heads * mask.head_stride +
               t * mask.query_stride;
    // What is multiplied by the size of the scale is at most zero: rounding cannot make it greater.
    float most = LOWEST, total = 0.0f;
    G::packs(limit, [&](int64_t i, int count) {
      float v[PACK];
      const uint32_t allowed = load_scores(from, bytes, i, count, aligned, negative, v);
      float now = most;
#pragma unroll
      for (int k = 0; k < PACK; k++)
        if (allowed >> k & 1u) now = fmaxf(now, v[k]);
      if (now > most) total *= expf((most - now) * size);
#pragma unroll
      for (int k = 0; k < PACK; k++)
        if (allowed >> k & 1u) total += expf((v[k] - now) * size);
      most = now;
    });
    const float highest = G::max(most);
    total = G::sum(most < highest ? total * expf((most - highest) * size) : total);
    const float part = total == 0.0f ? 0.0f : 1.0f / total;
    G::packs(is.keys, [&](int64_t i, int count) {
      float v[PACK] = {};
      const int before = limit - i < count ? limit - i < 0 ? 0 : int(limit - i) : count;
      uint32_t allowed = 0;
      if (before) allowed = load_scores(from, bytes, i, before, aligned, negative, v);
#pragma unroll
      for (int k = 0; k < PACK; k++)
        v[k] = allowed >> k & 1u ? expf((v[k] - highest) * size) * part : 0.0f;
      store_pack(to + i, count, aligned, v);
    });
  }
}

template <typename G, typename T>
__global__ void __launch_bounds__(THREADS)
    backward(int64_t rows, int64_t cols, const T *dy, const T *y, float scale, T *dx,
             bool aligned) {
  for (int64_t row = G::row(); row < rows; row += G::stride()) {
    const int64_t start = row * cols;
    float total = 0.0f;
    G::packs(cols, [&](int64_t i, int count) {
      float a[PACK], b[PACK];
      load_pack(dy + start + i, count, aligned, a);
      load_pack(y + start + i, count, aligned, b);
#pragma unroll
      for (int k = 0; k < PACK; k++) total += a[k] * b[k];
    });
    total = G::sum(total);
    G::packs(cols, [&](int64_t i, int count) {
      float a[PACK], b[PACK];
      load_pack(dy + start + i, count, aligned, a);
      load_pack(y + start + i, count, aligned, b);
#pragma unroll
      for (int k = 0; k < PACK; k++) a[k] = scale * (b[k] * (a[k] - total));
      store_pack(dx + start + i, count, aligned, a);
    });
  }
}

}  // namespace

int bt_softmax_forward(int64_t batch, int64_t heads, int64_t queries, int64_t keys, const void *x,
                       float scale, int causal, const uint8_t *mask, int64_t mask_batch_stride,
                       int64_t mask_head_stride, int64_t mask_query_stride, void *y, int dtype,
                       int device, void *stream) {
  const int64_t rows = batch * heads * queries;
  if (rows == 0 || keys == 0) return BT_OK;
  const Scores is = {heads, queries, keys};
  const Mask allowed = {mask, mask_batch_stride, mask_head_stride, mask_query_stride};
  const bool aligned = can_pack(x, y) && keys % PACK == 0;
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
      BT_LAUNCH_ROWS(rows, keys, forward, T, stream, rows, is, static_cast<const T *>(x), scale,
                     causal != 0, allowed, static_cast<T *>(y), aligned));
  return on.status();
}

int bt_softmax_backward(int64_t rows, int64_t cols, const void *dy, const void *y, float scale,
                        void *dx, int dtype, int device, void *stream) {
  if (rows == 0 || cols == 0) return BT_OK;
  const bool aligned = can_pack(dy, y, dx) && cols % PACK == 0;
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
      BT_LAUNCH_ROWS(rows, cols, backward, T, stream, rows, cols, static_cast<const T *>(dy),
                     static_cast<const T *>(y), scale, static_cast<T *>(dx), aligned));
  return on.status();
}
