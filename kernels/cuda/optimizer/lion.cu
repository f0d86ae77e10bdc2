// Lion: one pass over everything it reads and writes.
#include "bt_device.cuh"

namespace {

struct Lion {
  float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr;

  __device__ void operator()(float &main, float g, float &m) const {
    const float c = m * beta1 + one_minus_beta1 * g;
    const float sign = c > 0.0f ? 1.0f : c < 0.0f ? -1.0f : c;  // zero and NaN stay
    m = m * beta2 + one_minus_beta2 * g;
    main = main * decay - lr * sign;
  }
};

template <typename Param, typename Grad>
__global__ void __launch_bounds__(THREADS)
    lion(int64_t n, float *main, Param *param, const Grad *grad, float *exp_avg,
         const float *divisor, Lion update, bool aligned) {
  const float scale = divisor_of(divisor);
  if (!is_finite(scale)) return;
  for_each_pack(n, [&](int64_t i, int count) {
    float p[PACK], g[PACK], m[PACK];
    load_pack(main + i, count, aligned, p);
    load_pack(grad + i, count, aligned, g);
    load_pack(exp_avg + i, count, aligned, m);
#pragma unroll
    for (int k = 0; k < PACK; k++) update(p[k], g[k] / scale, m[k]);
    store_pack(main + i, count, aligned, p);
    store_pack(exp_avg + i, count, aligned, m);
    if (param) store_pack(param + i, count, aligned, p);
  });
}

}  // namespace

BT_API int bt_lion(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                   int grad_dtype, float *exp_avg, const float *divisor, float decay, float beta1,
                   float one_minus_beta1, float beta2, float one_minus_beta2, float lr, int device,
                   void *stream) {
  if (n <= 0) return n == 0 ? BT_OK : BT_BAD_ARGUMENT;
  const Lion update{decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr};
  const bool aligned = can_pack(main, param, grad, exp_avg);
  OnDevice on(device);
  BT_DISPATCH_IF(param, param_dtype, Param,
      BT_DISPATCH(grad_dtype, Grad,
          BT_LAUNCH(lion<Param, Grad>, blocks_for(n), THREADS, 0, stream, n, main,
                    static_cast<Param *>(param), static_cast<const Grad *>(grad), exp_avg, divisor,
                    update, aligned)));
  return on.status();
}
