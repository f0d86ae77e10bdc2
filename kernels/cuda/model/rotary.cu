// Rotary position embedding of tensors with any strides. https://arxiv.org/abs/2104.09864
#include "bt_device.cuh"

namespace {

struct Strides { int64_t batch, seq, head; };

// A thread turns packs of pairs. A block has a position of a sample, or several if they are small.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    rotary(int64_t rows, int64_t seq, int heads, int half, const T *x, Strides from, T *out,
           Strides to, const float *table, int64_t table_len, float direction, bool aligned) {
  const int packs = (half + PACK - 1) / PACK, items = heads * packs;
  const int together = items < THREADS ? THREADS / items : 1;
  const int step = together == 1 ? THREADS : items;
  const int own = threadIdx.x / step, first = threadIdx.x % step;
  if (own >= together) return;
  for (int64_t row = int64_t(blockIdx.x) * together + own; row < rows;
       row += int64_t(gridDim.x) * together) {
    const int64_t b = row / seq, t = row - b * seq;
    const float *cosines = table + t * half, *sines = cosines + table_len * half;
    const T *x_row = x + b * from.batch + t * from.seq;
    T *out_row = out + b * to.batch + t * to.seq;
    for (int item = first; item < items; item += step) {
      const int h = item / packs, i = item % packs * PACK, count = min(half - i, PACK);
      const T *x_head = x_row + h * from.head + i;
      T *out_head = out_row + h * to.head + i;
      float left[PACK], right[PACK], c[PACK], s[PACK];
      load_pack(x_head, count, aligned, left);
      load_pack(x_head + half, count, aligned, right);
      load_pack(cosines + i, count, aligned, c);
      load_pack(sines + i, count, aligned, s);
#pragma unroll
      for (int k = 0; k < PACK; k++) {
        const float l = left[k], r = right[k], turn = s[k] * direction;
        left[k] = l * c[k] - r * turn;
        right[k] = r * c[k] + l * turn;
      }
      store_pack(out_head, count, aligned, left);
      store_pack(out_head + half, count, aligned, right);
    }
  }
}

bool whole_packs(Strides strides) {
  return (strides.batch | strides.seq | strides.head) % PACK == 0;
}

}  // namespace

int bt_rotary(int64_t batch, int64_t seq, int64_t heads, int64_t head_size, const void *x,
              int64_t x_batch_stride, int64_t x_seq_stride, int64_t x_head_stride, void *out,
              int64_t out_batch_stride, int64_t out_seq_stride, int64_t out_head_stride,
              const float *table, int64_t table_len, float direction, int dtype, int device,
              void *stream) {
  if (head_size % 2 || seq > table_len || heads * head_size > INT32_MAX) return BT_BAD_ARGUMENT;
  const int64_t rows = batch * seq, half = head_size / 2;
  if (rows == 0 || heads == 0 || half == 0) return BT_OK;
  const Strides from = {x_batch_stride, x_seq_stride, x_head_stride};
  const Strides to = {out_batch_stride, out_seq_stride, out_head_stride};
  const bool aligned =
      can_pack(x, out, table) && half % PACK == 0 && whole_packs(from) && whole_packs(to);
  const int64_t items = heads * ((half + PACK - 1) / PACK);
  const unsigned grid = blocks_for(rows, items < THREADS ? THREADS / items : 1);
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
      BT_LAUNCH(rotary<T>, grid, THREADS, 0, stream, rows, seq, static_cast<int>(heads),
                static_cast<int>(half), static_cast<const T *>(x), from, static_cast<T *>(out), to,
                table, table_len, direction, aligned));
  return on.status();
}
