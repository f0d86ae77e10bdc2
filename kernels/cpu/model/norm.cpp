// LayerNorm (https://arxiv.org/abs/1607.06450) and RMSNorm (https://arxiv.org/abs/1910.07467). A row
// is read from memory once; the passes over it that follow find it in the cache.
#include "bt_rows.h"

using namespace bt;

namespace {

struct Stats { float mean, rstd; };

// Two passes, so that a large mean does not cancel the spread. SCALE: of the numbers whose squares
// are added.
template <bool RMS, class T> Stats stats_slowly(const T *t, int64_t cols, float eps, float scale) {
  float mean = 0.0f;
  if (!RMS) {
    const float sum = total_of(
        cols, [=](int64_t i, auto lanes) { return load(t + i, lanes) * scale; });
    mean = sum / float(cols) / scale;
  }
  const float squares = total_of(cols, [=](int64_t i, auto lanes) {
    const F d = (load(t + i, lanes) - mean) * scale;
    return d * d;
  });
  return {mean, scale / sqrtf(squares / float(cols) + eps * scale * scale)};
}

// One pass over the distances d from the first element, if they are not much larger than the spread.
template <bool RMS, class T> Stats stats_of(const T *t, int64_t cols, float eps) {
  const float first = RMS ? 0.0f : get(t);
  F sum[4] = {}, squares[4] = {};
  const auto add = [&](int64_t i, int k, auto lanes) {
    const F d = only(load(t + i, lanes) - first, lanes);
    if (!RMS) sum[k] += d;
    squares[k] += d * d;
  };
  int64_t i = 0;
  for (; i + 4 * LANES <= cols; i += 4 * LANES)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) add(i + k * LANES, k, Whole{});
  vectors(i, cols, [&](int64_t j, auto lanes) { add(j, 0, lanes); });

  const float to_mean = bt::sum((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(cols);
  const float square = bt::sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(cols);
  if (!std::isfinite(square)) return stats_slowly<RMS>(t, cols, eps, 0x1p-80f);  // too large
  if (to_mean * to_mean > 0.9f * square) return stats_slowly<RMS>(t, cols, eps, 1.0f);
  return {first + to_mean, 1.0f / sqrtf(square - to_mean * to_mean + eps)};
}

template <bool RMS, class T>
void forward(int64_t rows, int64_t cols, const T *x, const T *residual, const T *weight,
             const T *bias, float eps, T *sum, T *y, float *stats) {
  parallel(rows, 1, 2 * cols, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T *t = x + row * cols;
      if (residual) {
        const T *r = residual + row * cols;
        T *s = sum + row * cols;
        vectors(0, cols, [=](int64_t i, auto lanes) {
          store(s + i, load(t + i, lanes) + load(r + i, lanes), lanes);
        });
        t = s;
      }
      const auto [mean, rstd] = stats_of<RMS>(t, cols, eps);
      stats[2 * row] = mean;
      stats[2 * row + 1] = rstd;
      T *const out = y + row * cols;
      vectors(0, cols, [=, mean = mean, rstd = rstd](int64_t i, auto lanes) {
        F v = (load(t + i, lanes) - mean) * rstd;
        if (weight) v *= load(weight + i, lanes);
        if (bias) v += load(bias + i, lanes);
        store(out + i, v, lanes);
      });
    }
  });
}

template <class T> struct Backward {
  int64_t cols;
  const T *dy, *x, *weight;
  const float *stats;
  const T *dsum;
  T *dx;

  // ROWS rows from `row` on; what they give to dweight and dbias is added there (null: to nothing).
  // With h = (x - mean) * rstd and g = dy * weight, dx = rstd * (g - mean(g) - h * mean(g * h)).
  template <bool RMS, int ROWS> void rows(int64_t row, float *dweight, float *dbias) const {
    const T *const dy = this->dy + row * cols, *const x = this->x + row * cols;
    float mean[ROWS], rstd[ROWS];
    F sum[ROWS], dot[ROWS];
    for (int r = 0; r < ROWS; r++) {
      mean[r] = stats[2 * (row + r)];
      rstd[r] = stats[2 * (row + r) + 1];
      sum[r] = dot[r] = F{};
    }
    vectors(0, cols, [&](int64_t i, auto lanes) {
      const F w = weight ? load(weight + i, lanes) : all(1.0f);
      F to_weight{}, to_bias{};
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const F d = load(dy + r * cols + i, lanes);
        const F h = (load(x + r * cols + i, lanes) - mean[r]) * rstd[r];
        if (!RMS) sum[r] += d * w;
        dot[r] += d * w * h;
        to_weight += d * h;
        to_bias += d;
      }
      if (dweight) store(dweight + i, load(dweight + i, lanes) + to_weight, lanes);
      if (dbias) store(dbias + i, load(dbias + i, lanes) + to_bias, lanes);
    });
    for (int r = 0; r < ROWS; r++) {
      const float mean_g = bt::sum(sum[r]) / float(cols), mean_gh = bt::sum(dot[r]) / float(cols);
      finish<RMS>(row + r, mean[r], rstd[r], mean_g, mean_gh);
    }
  }

  template <bool RMS>
  void finish(int64_t row, float mean, float rstd, float mean_g, float mean_gh) const {
    const int64_t at = row * cols;
    vectors(0, cols, [=](int64_t i, auto lanes) {
      F g = load(dy + at + i, lanes);
      if (weight) g *= load(weight + i, lanes);
      const F h = (load(x + at + i, lanes) - mean) * rstd;
      F d = (g - mean_g - h * mean_gh) * rstd;
      if (dsum) d += load(dsum + at + i, lanes);
      store(dx + at + i, d, lanes);
    });
  }
};

template <bool RMS, class T>
void backward(int64_t num_rows, const Backward<T> &it, float *dweight, float *dbias,
              float *workspace) {
  const int64_t cols = it.cols, chunks = num_chunks(num_rows);
  parallel_chunks(num_rows, 4 * cols, [=](int64_t chunk, int64_t begin, int64_t end) {
    float *const part = workspace + chunk * 2 * cols;
    float *const to_weight = dweight ? part : nullptr, *const to_bias = dbias ? part + cols : nullptr;
    if (dweight || dbias) memset(part, 0, 2 * cols * sizeof *part);
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) it.template rows<RMS, 4>(row, to_weight, to_bias);
    for (; row < end; row++) it.template rows<RMS, 1>(row, to_weight, to_bias);
  });
  add_chunks(chunks, 2 * cols, cols, workspace, dweight);
  add_chunks(chunks, 2 * cols, cols, workspace + cols, dbias);
}

}  // namespace

BT_API int bt_norm_forward(int rms, int64_t rows, int64_t cols, const void *x, const void *residual,
                           const void *weight, const void *bias, float eps, void *sum, void *y,
                           float *stats, int dtype, int, void *) {
  BT_DISPATCH(dtype, T,
              const auto run = rms ? forward<true, T> : forward<false, T>;
              run(rows, cols, (const T *)x, (const T *)residual, (const T *)weight,
                  (const T *)bias, eps, (T *)sum, (T *)y, stats))
  return BT_OK;
}

BT_API int bt_norm_backward(int rms, int64_t rows, int64_t cols, const void *dy, const void *x,
                            const void *weight, const float *stats, const void *dsum, void *dx,
                            float *dweight, float *dbias, float *workspace, int dtype, int,
                            void *) {
  BT_DISPATCH(dtype, T,
              const auto run = rms ? backward<true, T> : backward<false, T>;
              run(rows,
                  {cols, (const T *)dy, (const T *)x, (const T *)weight, stats, (const T *)dsum,
                   (T *)dx},
                  dweight, dbias, workspace))
  return BT_OK;
}

BT_API int64_t bt_norm_workspace(int64_t rows, int64_t cols) { return num_chunks(rows) * 2 * cols; }
