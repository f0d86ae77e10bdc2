// SwiGLU: silu(gate) * up. https://arxiv.org/abs/2002.05202
#include "bt_columns.cuh"

namespace {

constexpr int ROWS_EACH = 4;

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T> struct Rows {
  T *at;
  int64_t stride;
};

template <typename T>
__global__ void __launch_bounds__(THREADS)
    swiglu(int64_t rows, int64_t cols, Rows<const T> gate, Rows<const T> up, T *out, bool aligned) {
  const int64_t mine = my_column();
  walk_rows(rows, mine, columns_left(cols, mine), [&](int64_t row, int64_t i, int count) {
    float g[PACK], u[PACK];
    load_pack(gate.at + row * gate.stride + i, count, aligned, g);
    load_pack(up.at + row * up.stride + i, count, aligned, u);
#pragma unroll
    for (int k = 0; k < PACK; k++) g[k] = g[k] * sigmoid(g[k]) * u[k];
    store_pack(out + row * cols + i, count, aligned, g);
  });
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    swiglu_backward(int64_t rows, int64_t cols, const T *dout, Rows<const T> gate, Rows<const T> up,
                    Rows<T> dgate, Rows<T> dup, bool aligned) {
  const int64_t mine = my_column();
  walk_rows(rows, mine, columns_left(cols, mine), [&](int64_t row, int64_t i, int count) {
    float d[PACK], g[PACK], u[PACK];
    load_pack(dout + row * cols + i, count, aligned, d);
    load_pack(gate.at + row * gate.stride + i, count, aligned, g);
    load_pack(up.at + row * up.stride + i, count, aligned, u);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
      const float s = sigmoid(g[k]), silu = g[k] * s;
      g[k] = d[k] * u[k] * (s + silu * (1.0f - s));
      u[k] = d[k] * silu;
    }
    store_pack(dgate.at + row * dgate.stride + i, count, aligned, g);
    store_pack(dup.at + row * dup.stride + i, count, aligned, u);
  });
}

// (host) Rows that follow each other without a gap are one long row.
template <typename... Strides> bool one_row(int64_t rows, int64_t cols, Strides... strides) {
  return rows == 1 || ((strides == cols) && ...);
}

template <typename T, typename... Strides>
bool all_can_pack(int64_t rows, int64_t cols, Strides... strides) {
  return rows == 1 || (rows_can_pack<T>(cols) && ... && rows_can_pack<T>(strides));
}

template <typename T>
void forward(int64_t rows, int64_t cols, const T *gate, int64_t gate_stride, const T *up,
             int64_t up_stride, T *out, void *stream) {
  if (one_row(rows, cols, gate_stride, up_stride)) cols *= rows, rows = 1;
  const bool aligned =
      can_pack(gate, up, out) && all_can_pack<T>(rows, cols, gate_stride, up_stride);
  const Walk how = walk(rows, cols, ROWS_EACH);
  BT_LAUNCH(swiglu<T>, how.grid, how.threads, 0, stream, rows, cols,
            Rows<const T>{gate, gate_stride}, Rows<const T>{up, up_stride}, out, aligned);
}

template <typename T>
void backward(int64_t rows, int64_t cols, const T *dout, Rows<const T> gate, Rows<const T> up,
              Rows<T> dgate, Rows<T> dup, void *stream) {
  if (one_row(rows, cols, gate.stride, up.stride, dgate.stride, dup.stride)) cols *= rows, rows = 1;
  const bool aligned =
      can_pack(dout, gate.at, up.at, dgate.at, dup.at) &&
      all_can_pack<T>(rows, cols, gate.stride, up.stride, dgate.stride, dup.stride);
  const Walk how = walk(rows, cols, ROWS_EACH);
  BT_LAUNCH(swiglu_backward<T>, how.grid, how.threads, 0, stream, rows, cols, dout, gate, up, dgate,
            dup, aligned);
}

}  // namespace

int bt_swiglu_forward(int64_t rows, int64_t cols, const void *gate, int64_t gate_stride,
                      const void *up, int64_t up_stride, void *out, int dtype, int device,
                      void *stream) {
  if (rows <= 0 || cols <= 0) return rows < 0 || cols < 0 ? BT_BAD_ARGUMENT : BT_OK;
  OnDevice on(device);
  BT_DISPATCH(dtype, T, forward(rows, cols, static_cast<const T *>(gate), gate_stride,
                                static_cast<const T *>(up), up_stride, static_cast<T *>(out),
                                stream));
  return on.status();
}

int bt_swiglu_backward(int64_t rows, int64_t cols, const void *dout, const void *gate,
                       int64_t gate_stride, const void *up, int64_t up_stride, void *dgate,
                       int64_t dgate_stride, void *dup, int64_t dup_stride, int dtype, int device,
                       void *stream) {
  if (rows <= 0 || cols <= 0) return rows < 0 || cols < 0 ? BT_BAD_ARGUMENT : BT_OK;
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
              backward<T>(rows, cols, static_cast<const T *>(dout),
                          {static_cast<const T *>(gate), gate_stride},
                          {static_cast<const T *>(up), up_stride},
                          {static_cast<T *>(dgate), dgate_stride},
                          {static_cast<T *>(dup), dup_stride}, stream));
  return on.status();
}
