// gelu(x + bias), by tanh or exact. https://arxiv.org/abs/1606.08415
#include "bt_columns.cuh"

namespace {

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// (1 + tanh(u)) / 2 is the sigmoid of 2 u, with 2 u = A * (x + B * x^3).
struct ByTanh {
  static constexpr float A = 1.5957691216f, B = 0.044715f;

  static __device__ float value(float x) { return x * sigmoid(A * (x + B * x * x * x)); }

  // Beyond +-30 it is 0 or 1; there, infinity times zero would come of it.
  static __device__ float slope(float x) {
    if (fabsf(x) > 30.0f) return x > 0.0f ? 1.0f : 0.0f;
    const float square = x * x, s = sigmoid(A * (x + B * square * x));
    return s + x * s * (1.0f - s) * (A + 3.0f * A * B * square);
  }
};

struct Exact {
  static __device__ float cdf(float x) { return 0.5f * erfcf(x * -0.70710678119f); }
  static __device__ float value(float x) { return x * cdf(x); }
  static __device__ float slope(float x) {
    if (fabsf(x) > 15.0f) return x > 0.0f ? 1.0f : 0.0f;
    return cdf(x) + x * (0.39894228040f * expf(-0.5f * x * x));
  }
};

template <typename Gelu, typename T>
__global__ void __launch_bounds__(THREADS)
    bias_gelu(int64_t rows, int64_t cols, const T *x, const T *bias, T *out, bool aligned) {
  const int64_t mine = my_column();
  const int left = columns_left(cols, mine);
  float b[PACK] = {};
  if (bias) load_pack(bias + mine, left, aligned, b);
  walk_rows(rows, mine, left, [&](int64_t row, int64_t i, int count) {
    float v[PACK];
    load_pack(x + row * cols + i, count, aligned, v);
#pragma unroll
    for (int k = 0; k < PACK; k++) v[k] = Gelu::value(v[k] + b[k]);
    store_pack(out + row * cols + i, count, aligned, v);
  });
}

// Each walker leaves the sum over its rows in `part`, [num_walkers, cols], if that is not null.
template <typename Gelu, typename T>
__global__ void __launch_bounds__(THREADS)
    bias_gelu_backward(int64_t rows, int64_t cols, const T *dout, const T *x, const T *bias, T *dx,
                       float *part, bool aligned) {
  const int64_t mine = my_column();
  const int left = columns_left(cols, mine);
  float b[PACK] = {}, sum[PACK] = {};
  if (bias) load_pack(bias + mine, left, aligned, b);
  walk_rows(rows, mine, left, [&](int64_t row, int64_t i, int count) {
    float d[PACK], v[PACK];
    load_pack(dout + row * cols + i, count, aligned, d);
    load_pack(x + row * cols + i, count, aligned, v);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
      d[k] *= Gelu::slope(v[k] + b[k]);
      sum[k] += d[k];
    }
    store_pack(dx + row * cols + i, count, aligned, d);
  });
  if (!part) return;
  const int64_t walker = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  store_pack(part + walker * cols + mine, left, false, sum);
}

template <typename T>
bool can_pack_rows(int64_t rows, int64_t cols, const T *x, const T *y, const T *z, const T *bias) {
  return can_pack(x, y, z, bias) && (rows == 1 || rows_can_pack<T>(cols));
}

template <typename Gelu, typename T>
void forward(int64_t rows, int64_t cols, const T *x, const T *bias, T *out, void *stream) {
  if (!bias) cols *= rows, rows = 1;
  const Walk how = walk(rows, cols, 4);
  BT_LAUNCH((bias_gelu<Gelu, T>), how.grid, how.threads, 0, stream, rows, cols, x, bias, out,
            can_pack_rows<T>(rows, cols, x, out, nullptr, bias));
}

constexpr int ROWS_OF_SUM = 16;

template <typename Gelu, typename T>
void backward(int64_t rows, int64_t cols, const T *dout, const T *x, const T *bias, T *dx,
              float *dbias, float *workspace, void *stream) {
  if (!bias && !dbias) cols *= rows, rows = 1;
  const Walk how = walk(rows, cols, dbias ? ROWS_OF_SUM : 4);
  BT_LAUNCH((bias_gelu_backward<Gelu, T>), how.grid, how.threads, 0, stream, rows, cols, dout, x,
            bias, dx, dbias ? workspace : nullptr, can_pack_rows<T>(rows, cols, dout, x, dx, bias));
  launch_add_chunks(how.num_walkers(), cols, cols, workspace, dbias, stream);
}

}  // namespace

int bt_bias_gelu_forward(int64_t rows, int64_t cols, const void *x, const void *bias, int by_tanh,
                         void *out, int dtype, int device, void *stream) {
  if (rows <= 0 || cols <= 0) return rows < 0 || cols < 0 ? BT_BAD_ARGUMENT : BT_OK;
  OnDevice on(device);
  BT_DISPATCH(dtype, T, const auto run = by_tanh ? forward<ByTanh, T> : forward<Exact, T>;
              run(rows, cols, static_cast<const T *>(x), static_cast<const T *>(bias),
                  static_cast<T *>(out), stream));
  return on.status();
}

int bt_bias_gelu_backward(int64_t rows, int64_t cols, const void *dout, const void *x,
                          const void *bias, int by_tanh, void *dx, float *dbias, float *workspace,
                          int dtype, int device, void *stream) {
  if (rows < 0 || cols <= 0) return rows < 0 || cols < 0 ? BT_BAD_ARGUMENT : BT_OK;
  OnDevice on(device);
  if (rows == 0) {
    launch_add_chunks(0, cols, cols, workspace, dbias, stream);
    return on.status();
  }
  BT_DISPATCH(dtype, T, const auto run = by_tanh ? backward<ByTanh, T> : backward<Exact, T>;
              run(rows, cols, static_cast<const T *>(dout), static_cast<const T *>(x),
                  static_cast<const T *>(bias), static_cast<T *>(dx), dbias, workspace, stream));
  return on.status();
}

int64_t bt_bias_gelu_workspace(int64_t rows, int64_t cols) {
  return walk(rows, cols, ROWS_OF_SUM).num_walkers() * cols;
}
