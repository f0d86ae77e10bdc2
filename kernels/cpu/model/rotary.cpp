// Rotary position embedding of tensors with any strides. https://arxiv.org/abs/2104.09864
#include "bt_cpu.h"

using namespace bt;

namespace {

struct Strides { int64_t batch, seq, head; };

template <class T>
void rotary(int64_t batch, int64_t seq, int64_t heads, int64_t head_size, const T *x, Strides from,
            T *out, Strides to, const float *table, int64_t table_len, float direction) {
  const int64_t half = head_size / 2;
  parallel(batch * seq, 1, heads * head_size, [=](int64_t begin, int64_t end) {
    int64_t b = begin / seq, t = begin % seq;
    for (int64_t row = begin; row < end; row++) {
      const float *cosines = table + t * half, *sines = cosines + table_len * half;
      const T *x_row = x + b * from.batch + t * from.seq;
      T *out_row = out + b * to.batch + t * to.seq;
      for (int64_t h = 0; h < heads; h++) {
        const T *x_head = x_row + h * from.head;
        T *out_head = out_row + h * to.head;
        vectors(0, half, [=](int64_t i, auto lanes) {
          const F first = load(x_head + i, lanes), second = load(x_head + half + i, lanes);
          const F c = load(cosines + i, lanes), s = load(sines + i, lanes) * direction;
          store(out_head + i, first * c - second * s, lanes);
          store(out_head + half + i, second * c + first * s, lanes);
        });
      }
      if (++t == seq) t = 0, b++;
    }
  });
}

}  // namespace

BT_API int bt_rotary(int64_t batch, int64_t seq, int64_t heads, int64_t head_size, const void *x,
                     int64_t x_batch_stride, int64_t x_seq_stride, int64_t x_head_stride, void *out,
                     int64_t out_batch_stride, int64_t out_seq_stride, int64_t out_head_stride,
                     const float *table, int64_t table_len, float direction, int dtype, int,
                     void *) {
  if (head_size % 2 || seq > table_len) return BT_BAD_ARGUMENT;
  const Strides from = {x_batch_stride, x_seq_stride, x_head_stride};
  const Strides to = {out_batch_stride, out_seq_stride, out_head_stride};
  BT_DISPATCH(dtype, T, rotary(batch, seq, heads, head_size, (const T *)x, from, (T *)out, to,
                               table, table_len, direction))
  return BT_OK;
}
