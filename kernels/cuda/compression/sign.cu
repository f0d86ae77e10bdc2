// Signs with error feedback, and their mean. A thread has 8 neighbouring elements: a byte of bits.
#include "blocks.cuh"

namespace {

__device__ inline float residual(float v, float s) { return v - copysignf(s, v); }

template <typename T>
__global__ void __launch_bounds__(THREADS)
    sign_pack(int64_t n, int64_t block, int64_t per_share, const T *x, float *state,
              float *state_scales, Scales scales, uint8_t *bits, bool mean_abs, bool aligned) {
  const auto load = [&](int64_t i, int count, float(&value)[PACK]) {
    float v[PACK];
    const float s = state_scales[i / block];
    load_pack(x + i, count, aligned, value);
    load_pack(state + i, count, aligned, v);
#pragma unroll
    for (int k = 0; k < PACK; k++) value[k] = k < count ? value[k] + residual(v[k], s) : 0.0f;
  };
  const auto measure = [&](float v) { return mean_abs ? fabsf(v) : v * v; };
  const auto scale_of = [&](int64_t b, float total, int64_t elements, bool writes) {
    const float mean = total / float(elements);
    return scales.put(b, mean_abs ? mean : sqrtf(mean), writes);
  };
  const auto keep = [&](int64_t i, int count, const float(&value)[PACK], float s) {
    unsigned byte = 0;
    if (s == s) {
#pragma unroll
      for (int k = 0; k < PACK; k++) byte |= (__float_as_uint(value[k]) >> 31) << k;
      store_pack(state + i, count, aligned, value);
      // Only with the last of a block: what is loaded again needs the old scale.
      if (i + count == n || (i + count) % block == 0) state_scales[i / block] = s;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
  };
  scale_blocks<Sum>(Share(n, block, per_share), load, measure, scale_of, keep);
}

__global__ void __launch_bounds__(THREADS)
    sign_residual(int64_t n, int64_t block, const float *state, const float *state_scales,
                  float *out, bool aligned) {
  for_each_pack(n, [&](int64_t i, int count) {
    float v[PACK];
    const float s = state_scales[i / block];
    load_pack(state + i, count, aligned, v);
#pragma unroll
    for (int k = 0; k < PACK; k++) v[k] = residual(v[k], s);
    store_pack(out + i, count, aligned, v);
  });
}

__global__ void __launch_bounds__(THREADS)
    sign_unpack_mean(int64_t n, int64_t block, Sources from, float weight, float *out,
                     bool aligned) {
  for_each_pack(n, [&](int64_t i, int count) {
    float sum[PACK] = {};
    const int64_t b = i / block;
    for (int64_t source = 0; source < from.count; source++) {
      const float s = from.scales_of(source).get(b);
      const unsigned byte = from.bytes_of(source)[i / 8];
#pragma unroll
      for (int k = 0; k < PACK; k++) sum[k] = sum[k] + (byte >> k & 1 ? -s : s);
    }
#pragma unroll
    for (int k = 0; k < PACK; k++) sum[k] = sum[k] * weight;
    store_pack(out + i, count, aligned, sum);
  });
}

}  // namespace

int bt_sign_pack(int64_t n, int64_t block, const void *x, int x_dtype, float *state,
                 float *state_scales, void *scales, int scale_dtype, uint8_t *bits, int mean_abs,
                 int device, void *stream) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  if (n == 0) return BT_OK;
  const bool aligned = can_pack(x, state);
  OnDevice on(device);
  BT_DISPATCH(x_dtype, T,
      BT_LAUNCH(sign_pack<T>, shares_of(n, block), THREADS, 0, stream, n, block, share_of(block),
                static_cast<const T *>(x), state, state_scales, Scales{scales, scale_dtype}, bits,
                mean_abs != 0, aligned));
  return on.status();
}

int bt_sign_residual(int64_t n, int64_t block, const float *state, const float *state_scales,
                     float *out, int device, void *stream) {
  if (!are_blocks(n, block)) return BT_BAD_ARGUMENT;
  if (n == 0) return BT_OK;
  OnDevice on(device);
  BT_LAUNCH(sign_residual, blocks_for(n), THREADS, 0, stream, n, block, state, state_scales, out,
            can_pack(state, out));
  return on.status();
}

int bt_sign_unpack_mean(int64_t n, int64_t block, int64_t num_sources, const uint8_t *bits,
                        int64_t bits_stride, const void *scales, int64_t scales_stride,
                        int scale_dtype, float weight, float *out, int device, void *stream) {
  if (!are_blocks(n, block, scale_dtype) || num_sources < 0) return BT_BAD_ARGUMENT;
  if (n == 0) return BT_OK;
  const Sources from{num_sources, bits, bits_stride, scales, scales_stride, scale_dtype};
  OnDevice on(device);
  BT_LAUNCH(sign_unpack_mean, blocks_for(n), THREADS, 0, stream, n, block, from, weight, out,
            can_pack(out));
  return on.status();
}
