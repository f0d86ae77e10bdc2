// LayerNorm (https://arxiv.org/abs/1607.06450) and RMSNorm (https://arxiv.org/abs/1910.07467). A team
// of threads, a warp or a block, has a row, and keeps what it can of it in registers: HELD packs a
// thread. What is behind them is read again when it is needed again, from the cache.
#include "bt_columns.cuh"

namespace {

template <int TEAM> __device__ float team_sum(float value) {
  if constexpr (TEAM == 32) return warp_sum(value);
  else return block_sum(value);
}

template <int TEAM> constexpr int block_of = TEAM < THREADS ? THREADS : TEAM;

template <int TEAM> __device__ int64_t my_team() {
  return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / TEAM;
}

// The packs of a row that this thread has: body(i, count, which) for those in registers, with
// `which` a constant, and rest(i, count) for the others.
template <int TEAM, int HELD, typename Body, typename Rest>
__device__ inline void each_pack(int64_t cols, Body body, Rest rest) {
  const int64_t first = int64_t(threadIdx.x % TEAM) * PACK;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int64_t i = first + int64_t(k) * TEAM * PACK;
    if (i < cols) body(i, columns_left(cols, i), k);
  }
  for (int64_t i = first + int64_t(HELD) * TEAM * PACK; i < cols; i += int64_t(TEAM) * PACK)
    rest(i, columns_left(cols, i));
}

// -- forward ---------------------------------------------------------------------------------------

template <typename T> struct Forward {
  int64_t rows, cols;
  const T *x, *residual, *weight, *bias;
  float eps;
  T *sum, *y;
  float *stats;
  bool aligned;

  // What is normalised, from `at` on.
  __device__ void load(int64_t at, int count, float (&value)[PACK]) const {
    load_pack(x + at, count, aligned, value);
    if (!residual) return;
    float more[PACK];
    load_pack(residual + at, count, aligned, more);
#pragma unroll
    for (int k = 0; k < PACK; k++) value[k] = rounded<T>(value[k] + more[k]);
  }

  __device__ void write(int64_t row, int64_t i, int count, float mean, float rstd,
                        float (&value)[PACK]) const {
    float factor[PACK];
#pragma unroll
    for (int k = 0; k < PACK; k++) value[k] = (value[k] - mean) * rstd;
    if (weight) {
      load_pack(weight + i, count, aligned, factor);
#pragma unroll
      for (int k = 0; k < PACK; k++) value[k] *= factor[k];
    }
    if (bias) {
      load_pack(bias + i, count, aligned, factor);
#pragma unroll
      for (int k = 0; k < PACK; k++) value[k] += factor[k];
    }
    store_pack(y + row * cols + i, count, aligned, value);
  }
};

constexpr int HELD_FORWARD = 4;

template <bool RMS, int TEAM, typename T>
__global__ void __launch_bounds__(block_of<TEAM>) norm(const __grid_constant__ Forward<T> with) {
  const int64_t row = my_team<TEAM>(), cols = with.cols, at = row * cols;
  if (row >= with.rows) return;
  float held[HELD_FORWARD][PACK];
  const auto each = [&](auto body) {
    each_pack<TEAM, HELD_FORWARD>(
        cols, [&](int64_t i, int count, int k) { body(i, count, held[k]); },
        [&](int64_t i, int count) {
          float value[PACK];
          with.load(at + i, count, value);
          body(i, count, value);
        });
  };
  each_pack<TEAM, HELD_FORWARD>(
      cols, [&](int64_t i, int count, int k) { with.load(at + i, count, held[k]); },
      [](int64_t, int) {});
  if (with.residual)
    each([&](int64_t i, int count, float(&value)[PACK]) {
      store_pack(with.sum + at + i, count, with.aligned, value);
    });

  // Two passes, so that a large mean does not cancel the spread; where squares overflow, again of
  // smaller numbers.
  float mean = 0.0f, squares = 0.0f, scale = 1.0f;
  for (;;) {
    if (!RMS) {
      float total = 0.0f;
      each([&](int64_t, int, float(&value)[PACK]) {  // behind `count` are zeros
#pragma unroll
        for (int k = 0; k < PACK; k++) total += value[k] * scale;
      });
      mean = team_sum<TEAM>(total) / float(cols) / scale;
    }
    squares = 0.0f;
    each([&](int64_t, int count, float(&value)[PACK]) {
#pragma unroll
      for (int k = 0; k < PACK; k++) {
        const float d = (value[k] - mean) * scale;
        squares += k < count ? d * d : 0.0f;
      }
    });
    squares = team_sum<TEAM>(squares);
    if (is_finite(squares) || scale != 1.0f) break;
    scale = 0x1p-80f;
  }
  const float rstd = scale / sqrtf(squares / float(cols) + with.eps * scale * scale);
  if (threadIdx.x % TEAM == 0) {
    with.stats[2 * row] = mean;
    with.stats[2 * row + 1] = rstd;
  }
  each([&](int64_t i, int count, float(&value)[PACK]) {
    with.write(row, i, count, mean, rstd, value);
  });
}

template <bool RMS, int TEAM, typename T>
void launch_forward(const Forward<T> &with, void *stream) {
  const int64_t blocks = (with.rows * TEAM + block_of<TEAM> - 1) / block_of<TEAM>;
  BT_LAUNCH((norm<RMS, TEAM, T>), unsigned(blocks), block_of<TEAM>, 0, stream, with);
}

// -- backward --------------------------------------------------------------------------------------

template <typename T> struct Backward {
  int64_t rows, cols;
  const T *dy, *x, *weight;
  const float *stats;
  const T *dsum;
  T *dx;
  float *part;  // [num_teams, 2, cols]: what the rows of a team give to dweight and dbias, or null
  int64_t num_teams;
  bool aligned;

  // g = dy * weight and h = (x - mean) * rstd; d = dy.
  __device__ void load(int64_t row, int64_t i, int count, float mean, float rstd, float (&d)[PACK],
                       float (&h)[PACK]) const {
    load_pack(dy + row * cols + i, count, aligned, d);
    load_pack(x + row * cols + i, count, aligned, h);
#pragma unroll
    for (int k = 0; k < PACK; k++) h[k] = (h[k] - mean) * rstd;
  }

  __device__ void weigh(int64_t i, int count, const float (&d)[PACK], float (&g)[PACK]) const {
#pragma unroll
    for (int k = 0; k < PACK; k++) g[k] = d[k];
    if (!weight) return;
    float w[PACK];
    load_pack(weight + i, count, aligned, w);
#pragma unroll
    for (int k = 0; k < PACK; k++) g[k] *= w[k];
  }

  __device__ void write(int64_t row, int64_t i, int count, float rstd, float mean_g, float mean_gh,
                        const float (&d)[PACK], const float (&h)[PACK]) const {
    float g[PACK], more[PACK];
    weigh(i, count, d, g);
#pragma unroll
    for (int k = 0; k < PACK; k++) g[k] = (g[k] - mean_g - h[k] * mean_gh) * rstd;
    if (dsum) {
      load_pack(dsum + row * cols + i, count, aligned, more);
#pragma unroll
      for (int k = 0; k < PACK; k++) g[k] += more[k];
    }
    store_pack(dx + row * cols + i, count, aligned, g);
  }

  // Adds the packs to what the team has so far, if they are not kept in registers.
  __device__ void add_columns(int64_t team, int64_t i, int count, bool first, const float (&d)[PACK],
                              const float (&h)[PACK]) const {
    float *const to_weight = part + team * 2 * cols + i, *const to_bias = to_weight + cols;
#pragma unroll
    for (int k = 0; k < PACK; k++) {
      if (k >= count) continue;
      to_weight[k] = (first ? 0.0f : to_weight[k]) + d[k] * h[k];
      to_bias[k] = (first ? 0.0f : to_bias[k]) + d[k];
    }
  }
};

constexpr int HELD_BACKWARD = 2;

// Every num_teams-th row.
template <bool RMS, int TEAM, typename T>
__global__ void __launch_bounds__(block_of<TEAM>)
    norm_backward(const __grid_constant__ Backward<T> with) {
  const int64_t team = my_team<TEAM>(), cols = with.cols;
  if (team >= with.num_teams) return;
  float dweight[HELD_BACKWARD][PACK] = {}, dbias[HELD_BACKWARD][PACK] = {};
  for (int64_t row = team; row < with.rows; row += with.num_teams) {
    const float mean = with.stats[2 * row], rstd = with.stats[2 * row + 1];
    float d[HELD_BACKWARD][PACK], h[HELD_BACKWARD][PACK];
    float sum = 0.0f, dot = 0.0f;
    const auto add = [&](int64_t i, int count, const float(&d)[PACK], const float(&h)[PACK]) {
      float g[PACK];
      with.weigh(i, count, d, g);
#pragma unroll
      for (int k = 0; k < PACK; k++) {  // behind `count`, g is zero
        sum += g[k];
        dot += g[k] * h[k];
      }
    };
    each_pack<TEAM, HELD_BACKWARD>(
        cols,
        [&](int64_t i, int count, int n) {
          with.load(row, i, count, mean, rstd, d[n], h[n]);
          add(i, count, d[n], h[n]);
#pragma unroll
          for (int k = 0; k < PACK; k++) {
            dweight[n][k] += d[n][k] * h[n][k];
            dbias[n][k] += d[n][k];
          }
        },
        [&](int64_t i, int count) {
          float d[PACK], h[PACK];
          with.load(row, i, count, mean, rstd, d, h);
          add(i, count, d, h);
          if (with.part) with.add_columns(team, i, count, row == team, d, h);
        });
    const float mean_g = RMS ? 0.0f : team_sum<TEAM>(sum) / float(cols);
    const float mean_gh = team_sum<TEAM>(dot) / float(cols);
    each_pack<TEAM, HELD_BACKWARD>(
        cols,
        [&](int64_t i, int count, int n) {
          with.write(row, i, count, rstd, mean_g, mean_gh, d[n], h[n]);
        },
        [&](int64_t i, int count) {
          float d[PACK], h[PACK];
          with.load(row, i, count, mean, rstd, d, h);
          with.write(row, i, count, rstd, mean_g, mean_gh, d, h);
        });
  }
  if (!with.part) return;
  float *const mine = with.part + team * 2 * cols;
  each_pack<TEAM, HELD_BACKWARD>(
      cols,
      [&](int64_t i, int count, int n) {
        store_pack(mine + i, count, false, dweight[n]);
        store_pack(mine + cols + i, count, false, dbias[n]);
      },
      [](int64_t, int) {});
}

template <bool RMS, int TEAM, typename T>
void launch_backward(const Backward<T> &with, void *stream) {
  const int64_t blocks = (with.num_teams * TEAM + block_of<TEAM> - 1) / block_of<TEAM>;
  BT_LAUNCH((norm_backward<RMS, TEAM, T>), unsigned(blocks), block_of<TEAM>, 0, stream, with);
}

// -- choosing --------------------------------------------------------------------------------------

template <bool RMS, typename T> void run(const Forward<T> &with, void *stream) {
  if (with.cols <= 32 * PACK * HELD_FORWARD) launch_forward<RMS, 32>(with, stream);
  else launch_forward<RMS, THREADS>(with, stream);
}

template <bool RMS, typename T> void run(const Backward<T> &with, void *stream) {
  if (with.cols <= 32 * PACK * HELD_BACKWARD) launch_backward<RMS, 32>(with, stream);
  else if (with.cols <= THREADS * PACK * HELD_BACKWARD) launch_backward<RMS, THREADS>(with, stream);
  else launch_backward<RMS, 2 * THREADS>(with, stream);
}

// Teams that share the rows of a sum over columns: of nothing but rows and cols.
int64_t num_teams(int64_t rows, int64_t cols) {
  const int64_t teams = (rows + 15) / 16, most = cols <= 32 * PACK * HELD_BACKWARD ? 4096 : 1024;
  return teams < most ? teams : most;
}

}  // namespace

int bt_norm_forward(int rms, int64_t rows, int64_t cols, const void *x, const void *residual,
                    const void *weight, const void *bias, float eps, void *sum, void *y,
                    float *stats, int dtype, int device, void *stream) {
  if (rows <= 0 || cols <= 0) return rows < 0 || cols < 0 ? BT_BAD_ARGUMENT : BT_OK;
  OnDevice on(device);
  BT_DISPATCH(dtype, T,
              const bool aligned = can_pack(x, residual, weight, bias, sum, y) &&
                                   rows_can_pack<T>(cols);
              const Forward<T> with{rows,
                                    cols,
                                    static_cast<const T *>(x),
                                    static_cast<const T *>(residual),
                                    static_cast<const T *>(weight),
                                    static_cast<const T *>(bias),
                                    eps,
                                    static_cast<T *>(sum),
                                    static_cast<T *>(y),
                                    stats,
                                    aligned};
              rms ? run<true>(with, stream) : run<false>(with, stream));
  return on.status();
}

int bt_norm_backward(int rms, int64_t rows, int64_t cols, const void *dy, const void *x,
                     const void *weight, const float *stats, const void *dsum, void *dx,
                     float *dweight, float *dbias, float *workspace, int dtype, int device,
                     void *stream) {
  if (rows < 0 || cols <= 0) return rows < 0 || cols < 0 ? BT_BAD_ARGUMENT : BT_OK;
  const bool sums = dweight || dbias;
  const int64_t teams = sums || rows > 1 << 20 ? num_teams(rows, cols) : rows;
  OnDevice on(device);
  if (rows > 0) {
    BT_DISPATCH(dtype, T,
                const bool aligned = can_pack(dy, x, weight, dsum, dx) && rows_can_pack<T>(cols);
                const Backward<T> with{rows,
                                       cols,
                                       static_cast<const T *>(dy),
                                       static_cast<const T *>(x),
                                       static_cast<const T *>(weight),
                                       stats,
                                       static_cast<const T *>(dsum),
                                       static_cast<T *>(dx),
                                       sums ? workspace : nullptr,
                                       teams,
                                       aligned};
                rms ? run<true>(with, stream) : run<false>(with, stream));
  }
  launch_add_chunks(int(teams), 2 * cols, cols, workspace, dweight, stream);
  launch_add_chunks(int(teams), 2 * cols, cols, workspace + cols, dbias, stream);
  return on.status();
}

int64_t bt_norm_workspace(int64_t rows, int64_t cols) { return num_teams(rows, cols) * 2 * cols; }
