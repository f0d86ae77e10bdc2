// LAMB: moments and the norms of tensors in one pass, then the step. A block of elements holds many
// tensors, which begin and end anywhere. https://arxiv.org/abs/1904.00962
#include "bt_device.cuh"

namespace {

constexpr int64_t CHUNK = THREADS * PACK;  // elements of a block of threads

struct LAMB {
  float one_minus_beta1, beta2, one_minus_beta2, correction1, correction2, eps, weight_decay;

  __device__ void moments(float g, float &m, float &v) const {
    m = m + one_minus_beta1 * (g - m);
    v = v * beta2 + one_minus_beta2 * g * g;
  }
  __device__ float direction(float main, float m, float v) const {
    return (m / correction1) / (sqrtf(v) / correction2 + eps) + weight_decay * main;
  }
};

struct Norms {
  double main, direction;  // sums of squares
};

// The tensors: number t is elements [offsets[t], offsets[t + 1]).
struct Tensors {
  int64_t count;
  const int64_t *offsets;

  __device__ int64_t begin(int64_t t) const { return offsets[t]; }
  __device__ int64_t end(int64_t t) const { return offsets[t + 1]; }

  // The first tensor that ends behind element i; `count` if none does.
  __device__ int64_t at(int64_t i) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (end(middle) <= i) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

// Where the sums of what tensor t has in a chunk are. Along a block of elements the chunk or the
// tensor is the next one, so that no two have the same place, and those of a tensor are neighbours.
__device__ int64_t place_of(int64_t chunk, int64_t t) { return chunk + t; }

template <typename Grad>
__global__ void __launch_bounds__(THREADS)
    lamb_moments(int64_t n, const float *main, const Grad *grad, float *exp_avg,
                 float *exp_avg_sq, const float *divisor, Tensors tensors, Norms *partial,
                 LAMB update, bool aligned) {
  const float scale = divisor_of(divisor);
  if (!is_finite(scale)) return;
  const int64_t begin = blockIdx.x * CHUNK, i = begin + threadIdx.x * PACK;
  const int count = n - i < PACK ? (n < i ? 0 : int(n - i)) : PACK;

  float p[PACK], g[PACK], m[PACK], v[PACK], u[PACK];
  load_pack(main + i, count, aligned, p);
  load_pack(grad + i, count, aligned, g);
  load_pack(exp_avg + i, count, aligned, m);
  load_pack(exp_avg_sq + i, count, aligned, v);
#pragma unroll
  for (int k = 0; k < PACK; k++) {
    update.moments(g[k] / scale, m[k], v[k]);
    u[k] = update.direction(p[k], m[k], v[k]);
  }
  store_pack(exp_avg + i, count, aligned, m);
  store_pack(exp_avg_sq + i, count, aligned, v);

  for (int64_t t = tensors.at(begin); t < tensors.count; t++) {
    const int64_t first = tensors.begin(t), last = tensors.end(t) < n ? tensors.end(t) : n;
    if (first >= begin + CHUNK) break;
    Norms mine = {0.0, 0.0};
#pragma unroll
    for (int k = 0; k < PACK; k++) {
      if (i + k < first || i + k >= last) continue;
      mine.main += double(p[k]) * double(p[k]);
      mine.direction += double(u[k]) * double(u[k]);
    }
    const Norms all = {block_sum(mine.main), block_sum(mine.direction)};
    if (threadIdx.x == 0) partial[place_of(blockIdx.x, t)] = all;
  }
}

// A block adds up what the chunks have of its tensor.
__global__ void __launch_bounds__(THREADS)
    lamb_norms(const float *divisor, Tensors tensors, const Norms *partial, Norms *norms) {
  if (!is_finite(divisor_of(divisor))) return;
  const int64_t t = blockIdx.x, begin = tensors.begin(t), end = tensors.end(t);
  Norms mine = {0.0, 0.0};
  if (begin < end) {
    const int64_t last = (end - 1) / CHUNK;
    for (int64_t chunk = begin / CHUNK + threadIdx.x; chunk <= last; chunk += THREADS) {
      const Norms part = partial[place_of(chunk, t)];
      mine.main += part.main;
      mine.direction += part.direction;
    }
  }
  const Norms all = {block_sum(mine.main), block_sum(mine.direction)};
  if (threadIdx.x == 0) norms[t] = all;
}

template <typename T>
__device__ void store_where(T *to, int count, unsigned inside, const float (&value)[PACK]) {
#pragma unroll
  for (int k = 0; k < PACK; k++)
    if (k < count && (inside >> k & 1)) to[k] = from_float<T>(value[k]);
}

template <typename Param>
__global__ void __launch_bounds__(THREADS)
    lamb_apply(int64_t n, float *main, Param *param, const float *exp_avg,
               const float *exp_avg_sq, const float *divisor, Tensors tensors,
               const float *ratios, float lr, LAMB update, bool aligned) {
  if (!is_finite(divisor_of(divisor))) return;
  for_each_pack(n, [&](int64_t i, int count) {
    float p[PACK], m[PACK], v[PACK];
    load_pack(main + i, count, aligned, p);
    load_pack(exp_avg + i, count, aligned, m);
    load_pack(exp_avg_sq + i, count, aligned, v);
    unsigned inside = 0;  // bit k: element i + k is of a tensor
    int64_t t = tensors.at(i);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
      while (t < tensors.count && tensors.end(t) <= i + k) t++;
      if (t == tensors.count || i + k < tensors.begin(t)) continue;
      inside |= 1u << k;
      p[k] = p[k] - (lr * ratios[t]) * update.direction(p[k], m[k], v[k]);
    }
    if (inside == (1u << PACK) - 1) {
      store_pack(main + i, count, aligned, p);
      if (param) store_pack(param + i, count, aligned, p);
    } else {
      store_where(main + i, count, inside, p);
      if (param) store_where(param + i, count, inside, p);
    }
  });
}

int64_t num_chunks(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

}  // namespace

BT_API int64_t bt_lamb_workspace(int64_t n, int64_t num_tensors) {
  return 2 * (num_chunks(n) + num_tensors);
}

BT_API int bt_lamb_moments(int64_t n, const float *main, const void *grad, int grad_dtype,
                           float *exp_avg, float *exp_avg_sq, const float *divisor,
                           int64_t num_tensors, const int64_t *offsets, double *norms,
                           double *workspace, float one_minus_beta1, float beta2,
                           float one_minus_beta2, float correction1, float correction2, float eps,
                           float weight_decay, int device, void *stream) {
  if (n < 0 || num_tensors < 0) return BT_BAD_ARGUMENT;
  const LAMB update{one_minus_beta1, beta2, one_minus_beta2, correction1,
                    correction2,     eps,   weight_decay};
  const Tensors tensors{num_tensors, offsets};
  Norms *const partial = reinterpret_cast<Norms *>(workspace);
  const bool aligned = can_pack(main, grad, exp_avg, exp_avg_sq);
  OnDevice on(device);
  if (n > 0) {
    BT_DISPATCH(grad_dtype, Grad,
        BT_LAUNCH(lamb_moments<Grad>, unsigned(num_chunks(n)), THREADS, 0, stream, n, main,
                  static_cast<const Grad *>(grad), exp_avg, exp_avg_sq, divisor, tensors, partial,
                  update, aligned));
  }
  if (num_tensors > 0)
    BT_LAUNCH(lamb_norms, unsigned(num_tensors), THREADS, 0, stream, divisor, tensors, partial,
              reinterpret_cast<Norms *>(norms));
  return on.status();
}

BT_API int bt_lamb_apply(int64_t n, float *main, void *param, int param_dtype,
                         const float *exp_avg, const float *exp_avg_sq, const float *divisor,
                         int64_t num_tensors, const int64_t *offsets, const float *ratios, float lr,
                         float correction1, float correction2, float eps, float weight_decay,
                         int device, void *stream) {
  if (n < 0 || num_tensors < 0) return BT_BAD_ARGUMENT;
  if (n == 0 || num_tensors == 0) return BT_OK;
  const LAMB update{0.0f, 0.0f, 0.0f, correction1, correction2, eps, weight_decay};
  const Tensors tensors{num_tensors, offsets};
  const bool aligned = can_pack(main, param, exp_avg, exp_avg_sq);
  OnDevice on(device);
  BT_DISPATCH_IF(param, param_dtype, Param,
      BT_LAUNCH(lamb_apply<Param>, blocks_for(n), THREADS, 0, stream, n, main,
                static_cast<Param *>(param), exp_avg, exp_avg_sq, divisor, tensors, ratios, lr,
                update, aligned));
  return on.status();
}
