// SwiGLU: silu(gate) * up. https://arxiv.org/abs/2002.05202
#include "bt_math.h"
#include "bt_rows.h"

using namespace bt;

namespace {

constexpr int64_t WORK = 4;  // of an element

template <class T>
void forward(int64_t rows, int64_t cols, const T *gate, int64_t gate_stride, const T *up,
             int64_t up_stride, T *out) {
  parallel_rows(rows, cols, WORK, [=](int64_t row, int64_t begin, int64_t end) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      const F g = load(gate + row * gate_stride + i, lanes);
      const F u = load(up + row * up_stride + i, lanes);
      store(out + row * cols + i, g * sigmoid(g) * u, lanes);
    });
  });
}

template <class T>
void backward(int64_t rows, int64_t cols, const T *dout, const T *gate, int64_t gate_stride,
              const T *up, int64_t up_stride, T *dgate, int64_t dgate_stride, T *dup,
              int64_t dup_stride) {
  parallel_rows(rows, cols, WORK, [=](int64_t row, int64_t begin, int64_t end) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      const F d = load(dout + row * cols + i, lanes);
      const F g = load(gate + row * gate_stride + i, lanes);
      const F u = load(up + row * up_stride + i, lanes);
      const Logistic s(g);
      store(dgate + row * dgate_stride + i, d * u * (s.value + g * s.slope), lanes);
      store(dup + row * dup_stride + i, d * (g * s.value), lanes);
    });
  });
}

}  // namespace

BT_API int bt_swiglu_forward(int64_t rows, int64_t cols, const void *gate, int64_t gate_stride,
                             const void *up, int64_t up_stride, void *out, int dtype, int,
                             void *) {
  BT_DISPATCH(dtype, T, forward(rows, cols, (const T *)gate, gate_stride, (const T *)up, up_stride,
                                (T *)out))
  return BT_OK;
}

BT_API int bt_swiglu_backward(int64_t rows, int64_t cols, const void *dout, const void *gate,
                              int64_t gate_stride, const void *up, int64_t up_stride, void *dgate,
                              int64_t dgate_stride, void *dup, int64_t dup_stride, int dtype, int,
                              void *) {
  BT_DISPATCH(dtype, T, backward(rows, cols, (const T *)dout, (const T *)gate, gate_stride,
                                 (const T *)up, up_stride, (T *)dgate, dgate_stride, (T *)dup,
                                 dup_stride))
  return BT_OK;
}
