// Cross entropy: what a row of logits, or a part of it, gives to the loss, and the gradient.
// Logits are read once in each direction.
#include "rows.cuh"

namespace {

template <typename G, typename T>
__global__ void __launch_bounds__(THREADS)
    forward(int64_t rows, int64_t cols, const T *logits, int64_t row_stride, const int64_t *targets,
            float *most, float *total, float *wanted, float *sum, bool aligned) {
  for (int64_t row = G::row(); row < rows; row += G::stride()) {
    const T *x = logits + row * row_stride;
    Online online;
    float plain = 0.0f;
    G::packs(cols, [&](int64_t i, int count) {
      float value[PACK];
      load_pack(x + i, count, aligned, value);
      online.add(value, count);
      if (sum) {
#pragma unroll
        for (int k = 0; k < PACK; k++) plain += value[k];
      }
    });
    online.combine<G>();
    if (sum) plain = G::sum(plain);
    if (G::thread() == 0) {
      const int64_t target = targets[row];
      most[row] = online.most;
      total[row] = online.total;
      wanted[row] = 0 <= target && target < cols ? to_float(x[target]) : 0.0f;
      if (sum) sum[row] = plain;
    }
  }
}

template <typename G, typename T>
__global__ void __launch_bounds__(THREADS)
    backward(int64_t rows, int64_t cols, const T *logits, int64_t row_stride,
             const int64_t *targets, const float *log_sum, const float *scale, float z_loss,
             float uniform, float hit, T *grad, int64_t grad_stride, bool aligned) {
  for (int64_t row = G::row(); row < rows; row += G::stride()) {
    const T *x = logits + row * row_stride;
    T *out = grad + row * grad_stride;
    const int64_t target = targets[row];
    const float log_total = log_sum[row], by = scale[row];
    const float factor = (1.0f + 2.0f * z_loss * log_total) * by, less = uniform * by;
    G::packs(cols, [&](int64_t i, int count) {
      float value[PACK];
      load_pack(x + i, count, aligned, value);
#pragma unroll
      for (int k = 0; k < PACK; k++) {
        value[k] = expf(value[k] - log_total) * factor - less;
        if (i + k == target) value[k] -= hit * by;
      }
      store_pack(out + i, count, aligned, value);
    });
  }
}

}  // namespace

int bt_cross_entropy_forward(int64_t rows, int64_t cols, const void *logits, int64_t row_stride,
                             const int64_t *targets, float *most, float *total, float *wanted,
                             float *sum, int dtype, int device, void *stream) {
  if (rows == 0) return BT_OK;
  const bool aligned = can_pack(logits) && row_stride % PACK == 0;
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
      BT_LAUNCH_ROWS(rows, cols, forward, T, stream, rows, cols, static_cast<const T *>(logits),
                     row_stride, targets, most, total, wanted, sum, aligned));
  return on.status();
}

int bt_cross_entropy_backward(int64_t rows, int64_t cols, const void *logits, int64_t row_stride,
                              const int64_t *targets, const float *log_sum, const float *scale,
                              float z_loss, float uniform, float hit, void *grad,
                              int64_t grad_stride, int dtype, int device, void *stream) {
  if (rows == 0 || cols == 0) return BT_OK;
  const bool aligned =
      can_pack(logits, grad) && row_stride % PACK == 0 && grad_stride % PACK == 0;
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
      BT_LAUNCH_ROWS(rows, cols, backward, T, stream, rows, cols, static_cast<const T *>(logits),
                     row_stride, targets, log_sum, scale, z_loss, uniform, hit,
                     static_cast<T *>(grad), grad_stride, aligned));
  return on.status();
}
