// Lion on a flat block in one pass. https://arxiv.org/abs/2302.06675
#include "bt_cpu.h"

using namespace bt;

namespace {

struct Numbers {
  float divisor, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr;
};

// 1, -1, or x itself: zero and NaN stay.
inline F sign(F x) { return choose(x > F{}, all(1.0f), choose(x < F{}, all(-1.0f), x)); }

template <class P, class G>
void lion(int64_t n, float *main, P *param, const G *grad, float *exp_avg, Numbers with) {
  parallel(n, 64, 4, [=](int64_t begin, int64_t end) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      const F g = load(grad + i, lanes) / with.divisor;
      const F m = load(exp_avg + i, lanes);
      const F c = m * with.beta1 + with.one_minus_beta1 * g;
      const F next = load(main + i, lanes) * with.decay - with.lr * sign(c);
      store(exp_avg + i, m * with.beta2 + with.one_minus_beta2 * g, lanes);
      store(main + i, next, lanes);
      store(param + i, next, lanes);
    });
  });
}

}  // namespace

BT_API int bt_lion(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                   int grad_dtype, float *exp_avg, const float *divisor, float decay, float beta1,
                   float one_minus_beta1, float beta2, float one_minus_beta2, float lr, int,
                   void *) {
  const Numbers with = {divisor ? *divisor : 1.0f, decay, beta1, one_minus_beta1, beta2,
                        one_minus_beta2,           lr};
  if (!std::isfinite(with.divisor)) return BT_OK;
  BT_DISPATCH(grad_dtype, G,
              BT_DISPATCH_IF(param, param_dtype, P,
                             lion(n, main, (P *)param, (const G *)grad, exp_avg, with)))
  return BT_OK;
}
