// AdamW: one pass over everything it reads and writes.
#include "bt_device.cuh"

namespace {

struct AdamW {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, correction2, eps;

  __device__ void operator()(float &main, float g, float &m, float &v) const {
    const float p = main * decay;
    m = m + one_minus_beta1 * (g - m);
    v = v * beta2 + one_minus_beta2 * g * g;
    main = p - step_size * m / (sqrtf(v) / correction2 + eps);
  }
};

template <typename Param, typename Grad>
__global__ void __launch_bounds__(THREADS)
    adamw(int64_t n, float *main, Param *param, const Grad *grad, float *exp_avg,
          float *exp_avg_sq, const float *divisor, AdamW update, bool aligned) {
  const float scale = divisor_of(divisor);
  if (!is_finite(scale)) return;
  for_each_pack(n, [&](int64_t i, int count) {
    float p[PACK], g[PACK], m[PACK], v[PACK];
    load_pack(main + i, count, aligned, p);
    load_pack(grad + i, count, aligned, g);
    load_pack(exp_avg + i, count, aligned, m);
    load_pack(exp_avg_sq + i, count, aligned, v);
#pragma unroll
    for (int k = 0; k < PACK; k++) update(p[k], g[k] / scale, m[k], v[k]);
    store_pack(main + i, count, aligned, p);
    store_pack(exp_avg + i, count, aligned, m);
    store_pack(exp_avg_sq + i, count, aligned, v);
    if (param) store_pack(param + i, count, aligned, p);
  });
}

}  // namespace

BT_API int bt_adamw(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                    int grad_dtype, float *exp_avg, float *exp_avg_sq, const float *divisor,
                    float decay, float one_minus_beta1, float beta2, float one_minus_beta2,
                    float step_size, float correction2, float eps, int device, void *stream) {
  if (n <= 0) return n == 0 ? BT_OK : BT_BAD_ARGUMENT;
  const AdamW update{decay,     one_minus_beta1, beta2, one_minus_beta2,
                     step_size, correction2,     eps};
  const bool aligned = can_pack(main, param, grad, exp_avg, exp_avg_sq);
  OnDevice on(device);
  BT_DISPATCH_IF(param, param_dtype, Param,
      BT_DISPATCH(grad_dtype, Grad,
          BT_LAUNCH(adamw<Param, Grad>, blocks_for(n), THREADS, 0, stream, n, main,
                    static_cast<Param *>(param), static_cast<const Grad *>(grad), exp_avg,
                    exp_avg_sq, divisor, update, aligned)));
  return on.status();
}
