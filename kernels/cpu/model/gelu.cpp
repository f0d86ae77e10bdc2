// gelu(x + bias), by tanh or exact. https://arxiv.org/abs/1606.08415
#include "bt_math.h"
#include "bt_rows.h"

using namespace bt;

namespace {

constexpr int64_t WORK = 4;  // of an element

// (1 + tanh(u)) / 2 is the sigmoid of 2 u, with 2 u = A * (x + B * x^3).
struct ByTanh {
  static constexpr float A = 1.5957691216f, B = 0.044715f;

  static F value(F x) { return x * sigmoid(A * (x + B * x * x * x)); }

  // Beyond +-30 it is 0 or 1; there, infinity times zero would come of it.
  static F slope(F x) {
    x = max(all(-30.0f), min(all(30.0f), x));
    const F square = x * x;
    const Logistic s(A * (x + B * square * x));
    return s.value + x * s.slope * (A + 3.0f * A * B * square);
  }
};

// The normal distribution function is a tail e^(-x^2 / 2) * t * p(t) with t = 1 / (1 + c * |x|) (the
// form of Abramowitz and Stegun 26.2.17, with a fit of its own, within 6e-9), or one minus that.
struct Exact {
  F x, density, cdf;

  explicit Exact(F wide) : x(max(all(-15.0f), min(all(15.0f), wide))) {
    const F e = exp_bounded(-0.5f * x * x), t = reciprocal(1.0f + 0.335f * abs(x));
    const F p = polynomial(t, {0.04405766726f, -0.2050871998f, 0.2863028049f, -0.04795677587f,
                               0.1620339155f, 0.1265549511f, 0.1340946406f});
    const F tail = p * t * e;
    density = 0.39894228040f * e;
    cdf = choose(x < 0.0f, tail, 1.0f - tail);
  }

  static F value(F x) { return x * Exact(x).cdf; }
  static F slope(F x) {
    const Exact at(x);
    return at.cdf + at.x * at.density;
  }
};

template <class Gelu, class T>
void forward(int64_t rows, int64_t cols, const T *x, const T *bias, T *out) {
  parallel_rows(rows, cols, WORK, [=](int64_t row, int64_t begin, int64_t end) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      F v = load(x + row * cols + i, lanes);
      if (bias) v += load(bias + i, lanes);
      store(out + row * cols + i, Gelu::value(v), lanes);
    });
  });
}

// dx of columns [begin, end) of a row; it is added to dbias, if that is not null.
template <class Gelu, class T>
inline void backward_of_row(int64_t begin, int64_t end, const T *dout, const T *x, const T *bias,
                            T *dx, float *dbias) {
  vectors(begin, end, [=](int64_t i, auto lanes) {
    F v = load(x + i, lanes);
    if (bias) v += load(bias + i, lanes);
    const F d = load(dout + i, lanes) * Gelu::slope(v);
    store(dx + i, d, lanes);
    if (dbias) store(dbias + i, load(dbias + i, lanes) + d, lanes);
  });
}

template <class Gelu, class T>
void backward(int64_t rows, int64_t cols, const T *dout, const T *x, const T *bias, T *dx,
              float *dbias, float *workspace) {
  const auto of_row = [=](int64_t row, int64_t begin, int64_t end, float *part) {
    const int64_t at = row * cols;
    backward_of_row<Gelu>(begin, end, dout + at, x + at, bias, dx + at, part);
  };
  if (!dbias) {
    parallel_rows(rows, cols, WORK, [=](int64_t row, int64_t begin, int64_t end) {
      of_row(row, begin, end, nullptr);
    });
    return;
  }
  parallel_chunks(rows, WORK * cols, [=](int64_t chunk, int64_t begin, int64_t end) {
    float *const part = workspace + chunk * cols;
    memset(part, 0, cols * sizeof *part);
    for (int64_t row = begin; row < end; row++) of_row(row, 0, cols, part);
  });
  add_chunks(num_chunks(rows), cols, cols, workspace, dbias);
}

}  // namespace

BT_API int bt_bias_gelu_forward(int64_t rows, int64_t cols, const void *x, const void *bias,
                                int by_tanh, void *out, int dtype, int, void *) {
  BT_DISPATCH(dtype, T, const auto run = by_tanh ? forward<ByTanh, T> : forward<Exact, T>;
              run(rows, cols, (const T *)x, (const T *)bias, (T *)out))
  return BT_OK;
}

BT_API int bt_bias_gelu_backward(int64_t rows, int64_t cols, const void *dout, const void *x,
                                 const void *bias, int by_tanh, void *dx, float *dbias,
                                 float *workspace, int dtype, int, void *) {
  BT_DISPATCH(dtype, T, const auto run = by_tanh ? backward<ByTanh, T> : backward<Exact, T>;
              run(rows, cols, (const T *)dout, (const T *)x, (const T *)bias, (T *)dx, dbias,
                  workspace))
  return BT_OK;
}

BT_API int64_t bt_bias_gelu_workspace(int64_t rows, int64_t cols) { return num_chunks(rows) * cols; }
