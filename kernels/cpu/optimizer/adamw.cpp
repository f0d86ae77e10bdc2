// AdamW on a flat block in one pass. https://arxiv.org/abs/1711.05101
#include "bt_cpu.h"

using namespace bt;

namespace {

struct Numbers {
  float divisor, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, correction2, eps;
};

template <class P, class G>
void adamw(int64_t n, float *main, P *param, const G *grad, float *exp_avg, float *exp_avg_sq,
           Numbers with) {
  parallel(n, 64, 4, [=](int64_t begin, int64_t end) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      const F g = load(grad + i, lanes) / with.divisor;
      F m = load(exp_avg + i, lanes), v = load(exp_avg_sq + i, lanes);
      m += with.one_minus_beta1 * (g - m);
      v = v * with.beta2 + with.one_minus_beta2 * g * g;
      const F p = load(main + i, lanes) * with.decay;
      const F next = p - with.step_size * m / (sqrt(v) / with.correction2 + with.eps);
      store(exp_avg + i, m, lanes);
      store(exp_avg_sq + i, v, lanes);
      store(main + i, next, lanes);
      store(param + i, next, lanes);
    });
  });
}

}  // namespace

BT_API int bt_adamw(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                    int grad_dtype, float *exp_avg, float *exp_avg_sq, const float *divisor,
                    float decay, float one_minus_beta1, float beta2, float one_minus_beta2,
                    float step_size, float correction2, float eps, int, void *) {
  const Numbers with = {divisor ? *divisor : 1.0f, decay,     one_minus_beta1, beta2,
                        one_minus_beta2,           step_size, correction2,     eps};
  if (!std::isfinite(with.divisor)) return BT_OK;
  BT_DISPATCH(grad_dtype, G,
              BT_DISPATCH_IF(param, param_dtype, P,
                             adamw(n, main, (P *)param, (const G *)grad, exp_avg, exp_avg_sq, with)))
  return BT_OK;
}
