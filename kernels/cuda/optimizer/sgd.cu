// SGD, with or without momentum: one pass.
#include "bt_device.cuh"

namespace {

struct SGD {
  float lr, momentum, weight_decay;
  bool nesterov;

  __device__ void operator()(float &main, float grad, float &buffer, bool has_buffer) const {
    const float g = grad + weight_decay * main;
    float d = g;
    if (has_buffer) {
      buffer = momentum * buffer + g;
      d = nesterov ? g + momentum * buffer : buffer;
    }
    main = main - lr * d;
  }
};

// Four blocks on a processor: left alone, the compiler spills registers to have one more.
template <typename Param, typename Grad>
__global__ void __launch_bounds__(THREADS, 4)
    sgd(int64_t n, float *main, Param *param, const Grad *grad, float *buffer,
        const float *divisor, SGD update, bool aligned) {
  const float scale = divisor_of(divisor);
  if (!is_finite(scale)) return;
  for_each_pack(n, [&](int64_t i, int count) {
    float p[PACK], g[PACK], b[PACK] = {};
    load_pack(main + i, count, aligned, p);
    load_pack(grad + i, count, aligned, g);
    if (buffer) load_pack(buffer + i, count, aligned, b);
#pragma unroll
    for (int k = 0; k < PACK; k++) update(p[k], g[k] / scale, b[k], buffer != nullptr);
    store_pack(main + i, count, aligned, p);
    if (buffer) store_pack(buffer + i, count, aligned, b);
    if (param) store_pack(param + i, count, aligned, p);
  });
}

}  // namespace

BT_API int bt_sgd(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                  int grad_dtype, float *buffer, const float *divisor, float lr, float momentum,
                  float weight_decay, int nesterov, int device, void *stream) {
  if (n <= 0) return n == 0 ? BT_OK : BT_BAD_ARGUMENT;
  const SGD update{lr, momentum, weight_decay, nesterov != 0};
  const bool aligned = can_pack(main, param, grad, buffer);
  OnDevice on(device);
  BT_DISPATCH_IF(param, param_dtype, Param,
      BT_DISPATCH(grad_dtype, Grad,
          BT_LAUNCH(sgd<Param, Grad>, blocks_for(n), THREADS, 0, stream, n, main,
                    static_cast<Param *>(param), static_cast<const Grad *>(grad), buffer, divisor,
                    update, aligned)));
  return on.status();
}
