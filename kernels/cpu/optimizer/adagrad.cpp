// Adagrad of a flat block, in one pass, and of some rows of a table, for sparse gradients: one pass,
// or two over a row in cache.
// https://jmlr.org/papers/v12/duchi11a.html
#include "bt_cpu.h"

using namespace bt;

namespace {

struct Adagrad {
  float divisor, lr, eps, weight_decay;

  template <class G, class Lanes> F gradient(const G *grad, const float *main, Lanes lanes) const {
    return load(grad, lanes) / divisor + weight_decay * load(main, lanes);
  }
  template <class P, class Lanes> void step(float *main, P *param, F g, F sum, Lanes lanes) const {
    const F next = load(main, lanes) - lr * g / (sqrt(sum) + eps);
    store(main, next, lanes);
    store(param, next, lanes);
  }
};

// Every element has a sum of its own.
template <class P, class G>
void by_element(int64_t begin, int64_t end, float *main, P *param, const G *grad, float *sum,
                const Adagrad &with) {
  vectors(begin, end, [=](int64_t j, auto lanes) {
    const F g = with.gradient(grad + j, main + j, lanes);
    const F total = load(sum + j, lanes) + g * g;
    store(sum + j, total, lanes);
    with.step(main + j, param + j, g, total, lanes);
  });
}

// A row has one sum, of its mean squares.
template <class P, class G>
void by_row(int64_t size, float *main, P *param, const G *grad, float *sum, const Adagrad &with) {
  Sum64 squares;
  vectors(0, size, [&](int64_t j, auto lanes) {
    const F g = with.gradient(grad + j, main + j, lanes);
    squares.add(j, g * g);
  });
  *sum += squares.total() / float(size);
  const F total = all(*sum);
  vectors(0, size, [=](int64_t j, auto lanes) {
    with.step(main + j, param + j, with.gradient(grad + j, main + j, lanes), total, lanes);
  });
}

}  // namespace

BT_API int bt_adagrad(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                      int grad_dtype, float *sum, const float *divisor, float lr, float eps,
                      float weight_decay, int, void *) {
  const Adagrad with = {divisor ? *divisor : 1.0f, lr, eps, weight_decay};
  if (!std::isfinite(with.divisor)) return BT_OK;
  BT_DISPATCH(grad_dtype, G, BT_DISPATCH_IF(param, param_dtype, P,
    parallel(n, 64, 4, [=](int64_t begin, int64_t end) {
      by_element(begin, end, main, (P *)param, (const G *)grad, sum, with);
    })))
  return BT_OK;
}

BT_API int bt_adagrad_rows(int64_t num_given, int64_t row_size, const int64_t *rows, float *main,
                           void *param, int param_dtype, const void *grad, int grad_dtype,
                           float *sum, int per_row, const float *divisor, float lr, float eps,
                           float weight_decay, int, void *) {
  const Adagrad with = {divisor ? *divisor : 1.0f, lr, eps, weight_decay};
  if (!std::isfinite(with.divisor) || row_size == 0) return BT_OK;
  BT_DISPATCH(grad_dtype, G, BT_DISPATCH_IF(param, param_dtype, P,
    parallel(num_given, 1, 4 * row_size, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = rows[i] * row_size;
        P *const out = std::is_same_v<P, None> ? nullptr : (P *)param + at;
        const G *const g = (const G *)grad + i * row_size;
        if (per_row) by_row(row_size, main + at, out, g, sum + rows[i], with);
        else by_element(0, row_size, main + at, out, g, sum + at, with);
      }
    })))
  return BT_OK;
}
