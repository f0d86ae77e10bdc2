// Signs with error feedback, and their mean. https://arxiv.org/abs/1901.09847
#include "blocks.h"

using namespace bt;

namespace {

// The signs of a vector, lane k in bit k.
inline uint32_t signs(F x) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)x);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)x);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)x);
#else
  uint32_t all = 0;
  for (int i = 0; i < LANES; i++) all |= (as_bits(x)[i] >> 31) << i;
  return all;
#endif
}

// The sign bit in the lanes whose bit, from bit `first` of `word` on, is set.
inline U sign_bits(uint32_t word, int first) {
  U moved;
#if defined(__SSE2__) && !defined(__AVX2__)  // cannot shift each lane by a number of its own
  for (int i = 0; i < LANES; i++) moved[i] = 1u << (first + i);
  moved = (U)((moved & word) == moved);
#else
  for (int i = 0; i < LANES; i++) moved[i] = 31 - first - i;
  moved = (U{} + word) << moved;
#endif
  return moved & 0x80000000u;
}

// sum plus s with the signs that are at `bits` from bit k * LANES on.
inline F plus_signed(F sum, float s, const uint8_t *bits, int k) {
#if defined(__AVX512F__)
  // Masks from memory, and no blend: both would wait for the same port.
  const __mmask16 minus = _load_mask16((__mmask16 *)bits + k);
  return (F)_mm512_mask_sub_ps((__m512)(sum + s), minus, (__m512)sum, _mm512_set1_ps(s));
#else
  uint32_t word;
  memcpy(&word, bits + k * LANES / 32 * 4, 4);
  return sum + as_float(as_bits(all(s)) ^ sign_bits(word, k * LANES % 32));
#endif
}

inline F residual(F v, F s) { return v - copysign(s, v); }

inline int64_t bytes_of(int64_t begin, int64_t end) { return (end - begin + 7) / 8; }

// The bits of a group: where they are, or if there are less than 64 a copy with zeros behind.
struct GroupBits {
  const uint8_t *at;
  uint64_t copy = 0;

  GroupBits(const uint8_t *bits, Whole) : at(bits) {}
  GroupBits(const uint8_t *bits, Part part) : at((const uint8_t *)&copy) {
    memcpy(&copy, bits, bytes_of(0, part.count));
  }
};

template <class T> struct Pack {
  const T *x;
  float *state, *state_scales;
  Scales scales;
  uint8_t *bits;
  bool mean_abs;

  // x + e; the lanes that are not there are zero.
  template <class Lanes> F corrected(int64_t i, F s, Lanes lanes) const {
    return only(load(x + i, lanes) + residual(load(state + i, lanes), s), lanes);
  }

  template <class Measure> float sum(int64_t begin, int64_t end, F s, Measure measure) const {
    Sum64 lanes_of_sum;
    F *const lane = lanes_of_sum.lane;
    groups(begin, end, [=](int64_t j, auto lanes) {
      each_vector(j, lanes, [=](int64_t i, int k, auto part) {
        lane[k] += measure(corrected(i, s, part));
      });
    });
    return lanes_of_sum.total();
  }

  float scale(int64_t begin, int64_t end, F s) const {
    const float count = float(end - begin);
    if (mean_abs) return sum(begin, end, s, [](F v) { return abs(v); }) / count;
    return std::sqrt(sum(begin, end, s, [](F v) { return v * v; }) / count);
  }

  // The first pass brings the block into the cache, the second finds it there.
  void operator()(int64_t begin, int64_t end, int64_t b) const {
    const F s = all(state_scales[b]);
    const float next = scales.put(b, scale(begin, end, s));
    if (next != next) {
      memset(bits + begin / 8, 0, bytes_of(begin, end));
      return;
    }
    state_scales[b] = next;
    groups(begin, end, [=](int64_t j, auto lanes) {
      uint64_t word = 0;
      each_vector(j, lanes, [&](int64_t i, int k, auto part) {
        const F v = corrected(i, s, part);
        word |= uint64_t(signs(v)) << (k * LANES);
        store(state + i, v, part);
      });
      memcpy(bits + j / 8, &word, bytes_of(j, j + GROUP < end ? j + GROUP : end));
    });
  }
};

}  // namespace

BT_API int bt_sign_pack(int64_t n, int64_t block, const void *x, int x_dtype, float *state,
                        float *state_scales, void *scales, int scale_dtype, uint8_t *bits,
                        int mean_abs, int, void *) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  BT_DISPATCH(x_dtype, T,
              all_blocks(n, block, 4, Pack<T>{(const T *)x, state, state_scales,
                                              {scales, scale_dtype}, bits, mean_abs != 0}))
  return BT_OK;
}

BT_API int bt_sign_residual(int64_t n, int64_t block, const float *state, const float *state_scales,
                            float *out, int, void *) {
  if (!are_blocks(n, block)) return BT_BAD_ARGUMENT;
  all_blocks(n, block, 2, [=](int64_t begin, int64_t end, int64_t b) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      store(out + i, residual(load(state + i, lanes), all(state_scales[b])), lanes);
    });
  });
  return BT_OK;
}

BT_API int bt_sign_unpack_mean(int64_t n, int64_t block, int64_t num_sources, const uint8_t *bits,
                               int64_t bits_stride, const void *scales, int64_t scales_stride,
                               int scale_dtype, float weight, float *out, int, void *) {
  if (!are_blocks(n, block, scale_dtype) || num_sources < 0) return BT_BAD_ARGUMENT;
  const auto add = [=](F *sum, int64_t source, int64_t j, float s, auto lanes) {
    const GroupBits group(bits + source * bits_stride + j / 8, lanes);
    each_vector(j, lanes, [&](int64_t, int k, auto) { sum[k] = plus_signed(sum[k], s, group.at, k); });
  };
  weighted_sums(n, block, num_sources, scales, scales_stride, scale_dtype, weight, out, add);
  return BT_OK;
}
