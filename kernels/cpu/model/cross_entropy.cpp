// Cross entropy: what a row of logits, or a part of it, gives to the loss, and the gradient.
// Logits are read from memory once in each direction.
#include "bt_math.h"

using namespace bt;

namespace {

constexpr float LOWEST = -3.40282347e38f;
constexpr int64_t CHUNK = 2048;  // columns, that stay in the first cache

// The maximum and the sum of powers of what was added so far. The sum is always that of
// exp(x - most), and is multiplied when `most` grows.
struct Online {
  float most = LOWEST;
  F total{};

  template <class T> void add(const T *x, int64_t count) {
    F highest[4];
    for (F &h : highest) h = all(most);
    fours(0, count, [&](int k, int64_t i, auto lanes) {
      highest[k] = max(inside(load(x + i, lanes), LOWEST, lanes), highest[k]);  // not NaN
    });
    const float now = largest(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
    F sums[4] = {total * exp_or_zero(all(most) - now)};
    fours(0, count, [&](int k, int64_t i, auto lanes) {
      sums[k] += exp_or_zero(inside(load(x + i, lanes) - now, -INFINITY, lanes));
    });
    most = now, total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  static F inside(F x, float, Whole) { return x; }
  static F inside(F x, float outside, Part part) {
    return choose(counting(0) < part.count, x, all(outside));
  }
};

template <class T> float plain_sum(const T *x, int64_t count) {
  F sums[4] = {};
  fours(0, count, [&](int k, int64_t i, auto lanes) { sums[k] += load(x + i, lanes); });
  return bt::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void forward(int64_t rows, int64_t cols, const T *logits, int64_t row_stride,
             const int64_t *targets, float *most, float *total, float *wanted, float *sum) {
  parallel(rows, 1, 4 * cols, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T *x = logits + row * row_stride;
      Online online;
      float plain = 0.0f;
      for (int64_t i = 0; i < cols; i += CHUNK) {
        const int64_t count = cols - i < CHUNK ? cols - i : CHUNK;
        online.add(x + i, count);
        if (sum) plain += plain_sum(x + i, count);
      }
      const int64_t target = targets[row];
      most[row] = online.most;
      total[row] = bt::sum(online.total);
      wanted[row] = 0 <= target && target < cols ? get(x + target) : 0.0f;
      if (sum) sum[row] = plain;
    }
  });
}

template <class T>
void backward(int64_t rows, int64_t cols, const T *logits, int64_t row_stride,
              const int64_t *targets, const float *log_sum, const float *scale, float z_loss,
              float uniform, float hit, T *grad, int64_t grad_stride) {
  parallel(rows, 1, 2 * cols, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T *x = logits + row * row_stride;
      T *out = grad + row * grad_stride;
      const float log_total = log_sum[row], by = scale[row];
      const float factor = (1.0f + 2.0f * z_loss * log_total) * by, less = uniform * by;
      const int64_t target = targets[row];
      const bool mine = 0 <= target && target < cols;
      const auto slope = [=](F logit) { return exp_or_zero(logit - log_total) * factor - less; };
      // Before the row is overwritten, if it is.
      const float aim = mine ? slope(all(get(x + target)))[0] - hit * by : 0.0f;
      vectors(0, cols, [=](int64_t i, auto lanes) {
        store(out + i, slope(load(x + i, lanes)), lanes);
      });
      if (mine) set(out + target, aim);
    }
  });
}

}  // namespace

BT_API int bt_cross_entropy_forward(int64_t rows, int64_t cols, const void *logits,
                                    int64_t row_stride, const int64_t *targets, float *most,
                                    float *total, float *wanted, float *sum, int dtype, int,
                                    void *) {
  BT_DISPATCH(dtype, T, forward(rows, cols, (const T *)logits, row_stride, targets, most, total,
                                wanted, sum))
  return BT_OK;
}

BT_API int bt_cross_entropy_backward(int64_t rows, int64_t cols, const void *logits,
                                     int64_t row_stride, const int64_t *targets,
                                     const float *log_sum, const float *scale, float z_loss,
                                     float uniform, float hit, void *grad, int64_t grad_stride,
                                     int dtype, int, void *) {
  BT_DISPATCH(dtype, T, backward(rows, cols, (const T *)logits, row_stride, targets, log_sum, scale,
                                 z_loss, uniform, hit, (T *)grad, grad_stride))
  return BT_OK;
}
