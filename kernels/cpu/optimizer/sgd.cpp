// SGD with momentum on a flat block in one pass.
#include "bt_cpu.h"

using namespace bt;

namespace {

struct Numbers {
  float divisor, lr, momentum, weight_decay;
};

template <bool NESTEROV, class P, class G, class B>
void sgd(int64_t n, float *main, P *param, const G *grad, B *buffer, Numbers with) {
  parallel(n, 64, 4, [=](int64_t begin, int64_t end) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      const F p = load(main + i, lanes);
      const F g = load(grad + i, lanes) / with.divisor + with.weight_decay * p;
      F d = g;
      if constexpr (!std::is_same_v<B, None>) {
        const F moved = with.momentum * load(buffer + i, lanes) + g;
        store(buffer + i, moved, lanes);
        d = NESTEROV ? g + with.momentum * moved : moved;
      }
      const F next = p - with.lr * d;
      store(main + i, next, lanes);
      store(param + i, next, lanes);
    });
  });
}

template <class P, class G>
void run(int64_t n, float *main, P *param, const G *grad, float *buffer, bool nesterov, Numbers with) {
  if (!buffer)
    sgd<false>(n, main, param, grad, (None *)nullptr, with);
  else if (nesterov)
    sgd<true>(n, main, param, grad, buffer, with);
  else
    sgd<false>(n, main, param, grad, buffer, with);
}

}  // namespace

BT_API int bt_sgd(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                  int grad_dtype, float *buffer, const float *divisor, float lr, float momentum,
                  float weight_decay, int nesterov, int, void *) {
  const Numbers with = {divisor ? *divisor : 1.0f, lr, momentum, weight_decay};
  if (!std::isfinite(with.divisor)) return BT_OK;
  BT_DISPATCH(grad_dtype, G,
              BT_DISPATCH_IF(param, param_dtype, P,
                             run(n, main, (P *)param, (const G *)grad, buffer, nesterov, with)))
  return BT_OK;
}
