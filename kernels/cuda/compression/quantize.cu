// Quantisation of blocks to 4 or 8 bits, with error feedback or as the change of a replica. A thread
// has 8 neighbouring elements: BITS bytes of codes.
#include "blocks.cuh"

namespace {

template <int BITS> constexpr int MOST = (1 << (BITS - 1)) - 1;

// The codes of a pack, as stored.
template <int BITS> using Codes = Stored<uint8_t, BITS>;

template <int BITS> __device__ Codes<BITS> encode(const int (&q)[PACK], int count) {
  Codes<BITS> codes = {};
#pragma unroll
  for (int k = 0; k < PACK; k++) {
    if (k >= count) continue;
    if (BITS == 8) codes.element[k] = static_cast<uint8_t>(q[k]);
    else codes.element[k / 2] |= static_cast<uint8_t>((q[k] + 8) << (k % 2 * 4));
  }
  return codes;
}

// Number k of a pack.
template <int BITS> __device__ float decode(const Codes<BITS> &codes, int k) {
  return BITS == 8 ? float(static_cast<int8_t>(codes.element[k]))
                   : float(int(codes.element[k / 2] >> (k % 2 * 4) & 15) - 8);
}

template <int BITS>
__device__ Codes<BITS> load_codes(const uint8_t *codes, int64_t i, int count, bool aligned) {
  const uint8_t *const from = codes + i / PACK * BITS;
  if (aligned && count == PACK) return *reinterpret_cast<const Codes<BITS> *>(from);
  Codes<BITS> value = {};
#pragma unroll
  for (int k = 0; k < BITS; k++)
    if (k < (count * BITS + 7) / 8) value.element[k] = from[k];
  return value;
}

template <int BITS>
__device__ void store_codes(uint8_t *codes, int64_t i, int count, bool aligned,
                            const Codes<BITS> &value) {
  uint8_t *const to = codes + i / PACK * BITS;
  if (aligned && count == PACK) {
    *reinterpret_cast<Codes<BITS> *>(to) = value;
    return;
  }
#pragma unroll
  for (int k = 0; k < BITS; k++)
    if (k < (count * BITS + 7) / 8) to[k] = value.element[k];
}

// (host) Whether the codes of a pack may be accessed as a word, in all rows.
inline bool can_pack_codes(const uint8_t *codes, int num_bits, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(codes) % num_bits == 0 && stride % num_bits == 0;
}

// Quantises the values that load(i, count, value) gives. keep(i, count, value, change) is told of
// every pack that is not left as it was, and of its q * s.
template <int BITS, typename Load, typename Keep>
__device__ void quantize(const Share &share, Scales scales, uint8_t *codes, bool codes_aligned,
                         Load load, Keep keep) {
  const auto scale_of = [&](int64_t b, float total, int64_t, bool writes) {
    return scales.put(b, total / float(MOST<BITS>), writes);
  };
  const auto keep_pack = [&](int64_t i, int count, const float(&value)[PACK], float s) {
    if (s != s) {
      store_codes<BITS>(codes, i, count, codes_aligned, Codes<BITS>{});
      return;
    }
    int q[PACK];
    float change[PACK];
#pragma unroll
    for (int k = 0; k < PACK; k++) {
      const int whole = s == 0.0f ? 0 : __float2int_rn(value[k] / s);
      q[k] = max(min(whole, MOST<BITS>), -MOST<BITS>);
      change[k] = float(q[k]) * s;
    }
    store_codes<BITS>(codes, i, count, codes_aligned, encode<BITS>(q, count));
    keep(i, count, value, change);
  };
  scale_blocks<Largest>(share, load, [](float v) { return fabsf(v); }, scale_of, keep_pack);
}

template <int BITS, typename T>
__global__ void __launch_bounds__(THREADS)
    quantize_feedback(int64_t n, int64_t block, int64_t per_share, const T *x, float *residual,
                      Scales scales, uint8_t *codes, bool codes_aligned, bool aligned) {
  const auto load = [&](int64_t i, int count, float(&value)[PACK]) {
    load_pack(x + i, count, aligned, value);
    if (!residual) return;
    float rest[PACK];
    load_pack(residual + i, count, aligned, rest);
#pragma unroll
    for (int k = 0; k < PACK; k++) value[k] = value[k] + rest[k];
  };
  const auto keep = [&](int64_t i, int count, const float(&value)[PACK],
                        const float(&change)[PACK]) {
    if (!residual) return;
    float rest[PACK];
#pragma unroll
    for (int k = 0; k < PACK; k++) rest[k] = value[k] - change[k];
    store_pack(residual + i, count, aligned, rest);
  };
  quantize<BITS>(Share(n, block, per_share), scales, codes, codes_aligned, load, keep);
}

// replica += change, for a pack.
template <typename T>
__device__ void move_replica(T *replica, int64_t i, int count, bool aligned,
                             const float (&change)[PACK]) {
  float value[PACK];
  load_pack(replica + i, count, aligned, value);
#pragma unroll
  for (int k = 0; k < PACK; k++) value[k] = value[k] + change[k];
  store_pack(replica + i, count, aligned, value);
}

template <int BITS, typename T>
__global__ void __launch_bounds__(THREADS)
    delta_pack(int64_t n, int64_t block, int64_t per_share, const float *main, T *replica,
               Scales scales, uint8_t *codes, bool codes_aligned, bool aligned) {
  const auto load = [&](int64_t i, int count, float(&value)[PACK]) {
    float old[PACK];
    load_pack(main + i, count, aligned, value);
    load_pack(replica + i, count, aligned, old);
#pragma unroll
    for (int k = 0; k < PACK; k++) value[k] = value[k] - old[k];
  };
  const auto keep = [&](int64_t i, int count, const float(&)[PACK], const float(&change)[PACK]) {
    move_replica(replica, i, count, aligned, change);
  };
  quantize<BITS>(Share(n, block, per_share), scales, codes, codes_aligned, load, keep);
}

template <int BITS, typename T>
__global__ void __launch_bounds__(THREADS)
    delta_apply(int64_t n, int64_t block, const uint8_t *codes, Scales scales, T *replica,
                bool codes_aligned, bool aligned) {
  for_each_pack(n, [&](int64_t i, int count) {
    const float s = scales.get(i / block);
    if (s != s) return;
    const Codes<BITS> packed = load_codes<BITS>(codes, i, count, codes_aligned);
    float change[PACK];
#pragma unroll
    for (int k = 0; k < PACK; k++) change[k] = decode<BITS>(packed, k) * s;
    move_replica(replica, i, count, aligned, change);
  });
}

template <int BITS, typename T>
__global__ void __launch_bounds__(THREADS)
    dequantize_mean(int64_t n, int64_t block, Sources from, float weight, T *out,
                    bool codes_aligned, bool aligned) {
  for_each_pack(n, [&](int64_t i, int count) {
    float sum[PACK] = {};
    const int64_t b = i / block;
    for (int64_t source = 0; source < from.count; source++) {
      const float s = from.scales_of(source).get(b);
      const Codes<BITS> packed = load_codes<BITS>(from.bytes_of(source), i, count, codes_aligned);
#pragma unroll
      for (int k = 0; k < PACK; k++) sum[k] = sum[k] + decode<BITS>(packed, k) * s;
    }
#pragma unroll
    for (int k = 0; k < PACK; k++) sum[k] = sum[k] * weight;
    store_pack(out + i, count, aligned, sum);
  });
}

}  // namespace

// Runs the statements with BITS the constant that num_bits is; in a function that returns a status.
#define DISPATCH_BITS(num_bits, BITS, ...) \
  switch (num_bits) {                      \
    case 4: {                              \
      constexpr int BITS = 4;              \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    case 8: {                              \
      constexpr int BITS = 8;              \
      __VA_ARGS__;                         \
      break;                               \
    }                                      \
    default:                               \
      return BT_BAD_ARGUMENT;              \
  }

int bt_quantize(int64_t n, int64_t block, int num_bits, const void *x, int x_dtype, float *residual,
                void *scales, int scale_dtype, uint8_t *codes, int device, void *stream) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  if (n == 0) return BT_OK;
  OnDevice on(device);
  DISPATCH_BITS(num_bits, BITS, BT_DISPATCH(x_dtype, T,
      BT_LAUNCH(quantize_feedback<BITS, T>, shares_of(n, block), THREADS, 0, stream, n, block,
                share_of(block), static_cast<const T *>(x), residual, Scales{scales, scale_dtype},
                codes, can_pack_codes(codes, BITS), can_pack(x, residual))));
  return on.status();
}

int bt_dequantize_mean(int64_t n, int64_t block, int num_bits, int64_t num_sources,
                       const uint8_t *codes, int64_t codes_stride, const void *scales,
                       int64_t scales_stride, int scale_dtype, float weight, void *out,
                       int out_dtype, int device, void *stream) {
  if (!are_blocks(n, block, scale_dtype) || num_sources < 0) return BT_BAD_ARGUMENT;
  if (n == 0) return BT_OK;
  const Sources from{num_sources, codes, codes_stride, scales, scales_stride, scale_dtype};
  OnDevice on(device);
  DISPATCH_BITS(num_bits, BITS, BT_DISPATCH(out_dtype, T,
      BT_LAUNCH(dequantize_mean<BITS, T>, blocks_for(n), THREADS, 0, stream, n, block, from, weight,
                static_cast<T *>(out), can_pack_codes(codes, BITS, codes_stride), can_pack(out))));
  return on.status();
}

int bt_delta_pack(int64_t n, int64_t block, int num_bits, const float *main, void *replica,
                  int dtype, void *scales, int scale_dtype, uint8_t *codes, int device,
                  void *stream) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  if (n == 0) return BT_OK;
  OnDevice on(device);
  DISPATCH_BITS(num_bits, BITS, BT_DISPATCH(dtype, T,
      BT_LAUNCH(delta_pack<BITS, T>, shares_of(n, block), THREADS, 0, stream, n, block,
                share_of(block), main, static_cast<T *>(replica), Scales{scales, scale_dtype},
                codes, can_pack_codes(codes, BITS), can_pack(main, replica))));
  return on.status();
}

int bt_delta_apply(int64_t n, int64_t block, int num_bits, const uint8_t *codes, const void *scales,
                   int scale_dtype, void *replica, int dtype, int device, void *stream) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  if (n == 0) return BT_OK;
  const Scales from{const_cast<void *>(scales), scale_dtype};
  OnDevice on(device);
  DISPATCH_BITS(num_bits, BITS, BT_DISPATCH(dtype, T,
      BT_LAUNCH(delta_apply<BITS, T>, blocks_for(n), THREADS, 0, stream, n, block, codes, from,
                static_cast<T *>(replica), can_pack_codes(codes, BITS), can_pack(replica))));
  return on.status();
}
