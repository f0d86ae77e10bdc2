// Adagrad of a flat block; and of rows of a table. There sixteen threads have a row: each holds 4 of
// the 64 lanes of its sum.
#include "bt_device.cuh"

namespace {

constexpr int LANES = 64, HELD = 4, TEAM = LANES / HELD;

struct Adagrad {
  float lr, eps, weight_decay;

  __device__ float gradient(float grad, float main) const { return grad + weight_decay * main; }
  __device__ void step(float &main, float g, float sum) const {
    main = main - lr * g / (sqrtf(sum) + eps);
  }
};

template <typename Param, typename Grad>
__global__ void __launch_bounds__(THREADS)
    adagrad(int64_t n, float *main, Param *param, const Grad *grad, float *sum,
            const float *divisor, Adagrad update, bool aligned) {
  const float scale = divisor_of(divisor);
  if (!is_finite(scale)) return;
  for_each_pack(n, [&](int64_t i, int count) {
    float p[PACK], g[PACK], s[PACK];
    load_pack(main + i, count, aligned, p);
    load_pack(grad + i, count, aligned, g);
    load_pack(sum + i, count, aligned, s);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
      g[k] = update.gradient(g[k] / scale, p[k]);
      s[k] = s[k] + g[k] * g[k];
      update.step(p[k], g[k], s[k]);
    }
    store_pack(main + i, count, aligned, p);
    store_pack(sum + i, count, aligned, s);
    if (param) store_pack(param + i, count, aligned, p);
  });
}

// The lanes of a team, halves added to each other. Every thread of the warp calls it, every thread
// of the team gets the total.
__device__ float total_of_team(float (&lane)[HELD]) {
#pragma unroll
  for (int k = 0; k < HELD; k++) lane[k] = warp_combine(lane[k], Add{}, TEAM);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

template <typename Param, typename Grad>
__global__ void __launch_bounds__(THREADS)
    adagrad_rows(int64_t num_given, int64_t row_size, const int64_t *rows, float *main,
                 Param *param, const Grad *grad, float *sum, bool per_row, const float *divisor,
                 Adagrad update, bool aligned) {
  const float scale = divisor_of(divisor);
  if (!is_finite(scale)) return;
  const int64_t given = int64_t(blockIdx.x) * (THREADS / TEAM) + threadIdx.x / TEAM;
  const int place = threadIdx.x % TEAM;
  // A team without a row goes along, since a warp sums together; its row has no elements.
  const int64_t size = given < num_given ? row_size : 0;
  const int64_t row = given < num_given ? rows[given] : 0;
  float *const main_row = main + row * row_size;
  const Grad *const grad_row = grad + (size ? given * row_size : 0);

  const auto load = [&](int64_t j, int count, float(&p)[HELD], float(&g)[HELD]) {
    load_pack(main_row + j, count, aligned, p);
    load_pack(grad_row + j, count, aligned, g);
#pragma unroll
    for (int k = 0; k < HELD; k++) g[k] = update.gradient(g[k] / scale, p[k]);
  };
  const auto count_at = [&](int64_t j) { return size - j < HELD ? int(size - j) : HELD; };

  float row_sum = 0.0f;
  if (per_row) {
    float lane[HELD] = {};
    for (int64_t j = place * HELD; j < size; j += LANES) {
      float p[HELD], g[HELD];
      const int count = count_at(j);
      load(j, count, p, g);
#pragma unroll
      for (int k = 0; k < HELD; k++)
        if (k < count) lane[k] = lane[k] + g[k] * g[k];
    }
    const float total = total_of_team(lane);
    if (size) row_sum = sum[row] + total / float(row_size);
    __syncwarp();  // all of the team have read the old sum
    if (size && place == 0) sum[row] = row_sum;
  }

  for (int64_t j = place * HELD; j < size; j += LANES) {
    float p[HELD], g[HELD], s[HELD];
    const int count = count_at(j);
    load(j, count, p, g);
    if (!per_row) load_pack(sum + row * row_size + j, count, aligned, s);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      s[k] = per_row ? row_sum : s[k] + g[k] * g[k];
      update.step(p[k], g[k], s[k]);
    }
    store_pack(main_row + j, count, aligned, p);
    if (!per_row) store_pack(sum + row * row_size + j, count, aligned, s);
    if (param) store_pack(param + row * row_size + j, count, aligned, p);
  }
}

}  // namespace

BT_API int bt_adagrad(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                      int grad_dtype, float *sum, const float *divisor, float lr, float eps,
                      float weight_decay, int device, void *stream) {
  if (n <= 0) return n == 0 ? BT_OK : BT_BAD_ARGUMENT;
  const Adagrad update{lr, eps, weight_decay};
  const bool aligned = can_pack(main, param, grad, sum);
  OnDevice on(device);
  BT_DISPATCH_IF(param, param_dtype, Param,
      BT_DISPATCH(grad_dtype, Grad,
          BT_LAUNCH(adagrad<Param, Grad>, blocks_for(n), THREADS, 0, stream, n, main,
                    static_cast<Param *>(param), static_cast<const Grad *>(grad), sum, divisor,
                    update, aligned)));
  return on.status();
}

BT_API int bt_adagrad_rows(int64_t num_given, int64_t row_size, const int64_t *rows, float *main,
                           void *param, int param_dtype, const void *grad, int grad_dtype,
                           float *sum, int per_row, const float *divisor, float lr, float eps,
                           float weight_decay, int device, void *stream) {
  if (num_given < 0 || row_size < 0) return BT_BAD_ARGUMENT;
  if (num_given == 0 || row_size == 0) return BT_OK;
  const Adagrad update{lr, eps, weight_decay};
  const bool aligned =
      row_size % HELD == 0 && can_pack(main, param, grad, per_row ? nullptr : sum);
  const unsigned blocks = unsigned((num_given * TEAM + THREADS - 1) / THREADS);
  OnDevice on(device);
  BT_DISPATCH_IF(param, param_dtype, Param,
      BT_DISPATCH(grad_dtype, Grad,
          BT_LAUNCH(adagrad_rows<Param, Grad>, blocks, THREADS, 0, stream, num_given, row_size,
                    rows, main, static_cast<Param *>(param), static_cast<const Grad *>(grad), sum,
                    per_row != 0, divisor, update, aligned)));
  return on.status();
}
