// LAMB on a flat block of many tensors: moments and norms in one pass, then the step.
// https://arxiv.org/abs/1904.00962
#include "bt_cpu.h"

using namespace bt;

namespace {

constexpr int64_t CHUNK = 16384;  // elements; sums of a chunk do not depend on who computes them

struct Lamb {
  float one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, weight_decay;

  F direction(F main, F m, F v) const {
    return (m / correction1) / (sqrt(v) / correction2 + eps) + weight_decay * main;
  }
};

struct Norms {
  double main, direction;  // sums of squares
};

// Number t is elements [offsets[t], offsets[t + 1]).
struct Tensors {
  int64_t count;
  const int64_t *offsets;

  // body(begin, end) for the padding before the first and behind the last tensor.
  template <class Body> void around(int64_t begin, int64_t end, Body body) const {
    if (begin < offsets[0]) body(begin, offsets[0] < end ? offsets[0] : end);
    if (offsets[count] < end) body(offsets[count] > begin ? offsets[count] : begin, end);
  }

  // body(t, begin, end) for the part of each tensor in elements [begin, end).
  template <class Body> void in(int64_t begin, int64_t end, Body body) const {
    int64_t t = 0;
    for (int64_t high = count; t < high;) {
      const int64_t middle = (t + high) / 2;
      if (offsets[middle + 1] <= begin) t = middle + 1;
      else high = middle;
    }
    for (; t < count && offsets[t] < end; t++) {
      const int64_t first = offsets[t] > begin ? offsets[t] : begin;
      const int64_t last = offsets[t + 1] < end ? offsets[t + 1] : end;
      if (first < last) body(t, first, last);
    }
  }
};

// A chunk and a tensor have one place for their sums: along the block either is the next one.
Norms &place(double *workspace, int64_t chunk, int64_t t) { return ((Norms *)workspace)[chunk + t]; }

template <class G>
Norms moments(const float *main, const G *grad, float *exp_avg, float *exp_avg_sq, float divisor,
              const Lamb &with, int64_t begin, int64_t end) {
  Squares16 mains, directions;
  for (int64_t i = begin; i < end; i += 16) {
    const int64_t count = end - i < 16 ? end - i : 16;
    F p[16 / LANES], g[16 / LANES], m[16 / LANES], v[16 / LANES];
    load16(main + i, count, p);
    load16(grad + i, count, g);
    load16(exp_avg + i, count, m);
    load16(exp_avg_sq + i, count, v);
    F u[16 / LANES];
    for (int k = 0; k < 16 / LANES; k++) {
      g[k] /= divisor;
      m[k] += with.one_minus_beta1 * (g[k] - m[k]);
      v[k] = v[k] * with.beta2 + with.one_minus_beta2 * g[k] * g[k];
      u[k] = with.direction(p[k], m[k], v[k]);
    }
    clear_behind(count, u);  // 0 / 0 if eps is 0
    store16(exp_avg + i, count, m);
    store16(exp_avg_sq + i, count, v);
    mains.add(p);
    directions.add(u);
  }
  return {mains.total(), directions.total()};
}

template <class P>
void apply(float *main, P *param, const float *exp_avg, const float *exp_avg_sq, float rate,
           const Lamb &with, int64_t begin, int64_t end) {
  vectors(begin, end, [=](int64_t i, auto lanes) {
    const F p = load(main + i, lanes);
    const F u = with.direction(p, load(exp_avg + i, lanes), load(exp_avg_sq + i, lanes));
    const F next = p - rate * u;
    store(main + i, next, lanes);
    store(param + i, next, lanes);
  });
}

}  // namespace

BT_API int64_t bt_lamb_workspace(int64_t n, int64_t num_tensors) {
  return 2 * ((n + CHUNK - 1) / CHUNK + num_tensors);
}

BT_API int bt_lamb_moments(int64_t n, const float *main, const void *grad, int grad_dtype,
                           float *exp_avg, float *exp_avg_sq, const float *divisor,
                           int64_t num_tensors, const int64_t *offsets, double *norms,
                           double *workspace, float one_minus_beta1, float beta2,
                           float one_minus_beta2, float correction1, float correction2, float eps,
                           float weight_decay, int, void *) {
  const Lamb with = {one_minus_beta1, beta2, one_minus_beta2, correction1,
                     correction2,     eps,   weight_decay};
  const Tensors tensors = {num_tensors, offsets};
  const float by = divisor ? *divisor : 1.0f;
  if (!std::isfinite(by)) return BT_OK;
  BT_DISPATCH(grad_dtype, G, parallel(n, CHUNK, 4, [=](int64_t begin, int64_t end) {
    const auto update = [=](int64_t first, int64_t last) {
      return moments(main, (const G *)grad, exp_avg, exp_avg_sq, by, with, first, last);
    };
    tensors.around(begin, end, update);
    for (int64_t i = begin; i < end; i += CHUNK)
      tensors.in(i, i + CHUNK < end ? i + CHUNK : end, [=](int64_t t, int64_t first, int64_t last) {
        place(workspace, i / CHUNK, t) = update(first, last);
      });
  }))
  for (int64_t t = 0; t < num_tensors; t++) {
    Norms all = {0.0, 0.0};
    if (offsets[t] < offsets[t + 1])
      for (int64_t chunk = offsets[t] / CHUNK; chunk <= (offsets[t + 1] - 1) / CHUNK; chunk++) {
        all.main += place(workspace, chunk, t).main;
        all.direction += place(workspace, chunk, t).direction;
      }
    norms[2 * t] = all.main;
    norms[2 * t + 1] = all.direction;
  }
  return BT_OK;
}

BT_API int bt_lamb_apply(int64_t n, float *main, void *param, int param_dtype,
                         const float *exp_avg, const float *exp_avg_sq, const float *divisor,
                         int64_t num_tensors, const int64_t *offsets, const float *ratios, float lr,
                         float correction1, float correction2, float eps, float weight_decay,
                         int, void *) {
  const Lamb with = {0.0f, 0.0f, 0.0f, correction1, correction2, eps, weight_decay};
  const Tensors tensors = {num_tensors, offsets};
  if (divisor && !std::isfinite(*divisor)) return BT_OK;
  BT_DISPATCH_IF(param, param_dtype, P, parallel(n, 64, 4, [=](int64_t begin, int64_t end) {
    tensors.in(begin, end, [=](int64_t t, int64_t first, int64_t last) {
      P *const out = std::is_same_v<P, None> ? nullptr : (P *)param;
      apply(main, out, exp_avg, exp_avg_sq, lr * ratios[t], with, first, last);
    });
  }))
  return BT_OK;
}
