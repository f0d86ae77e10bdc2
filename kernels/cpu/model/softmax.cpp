// Softmax of scaled scores over the keys that are allowed; a row lies in the cache for all passes.
#include <type_traits>

#include "bt_math.h"

using namespace bt;

namespace {

// -1 for each of LANES bytes that is not zero.
inline I nonzero(const uint8_t *bytes) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)) != 0;
#elif defined(__AVX2__)
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)) != 0;
#else
  I wide;
  for (int k = 0; k < LANES; k++) wide[k] = bytes[k];
  return wide != 0;
#endif
}

struct All {};                          // every key is allowed
struct Some { const uint8_t *bytes; };  // those whose byte is not zero

// Which lanes of a vector from key i on count: those inside of the row that are allowed.
inline I counted(All, int64_t, Whole) { return I{} - 1; }
inline I counted(All, int64_t, Part part) {
  return counting(0) < part.count;
}
inline I counted(Some mask, int64_t i, Whole) { return nonzero(mask.bytes + i); }
inline I counted(Some mask, int64_t i, Part part) {
  uint8_t bytes[LANES] = {};
  memcpy(bytes, mask.bytes + i, part.count);
  return nonzero(bytes);
}

constexpr int64_t KEPT = 4096;  // powers that there is room for beside y

// One row, of which the first `count` keys may be allowed. The sign of the scale goes to x, and
// what is multiplied by its size is then at most zero: rounding cannot make it greater.
template <class Mask, class T>
void forward_row(int64_t count, int64_t keys, const T *x, float scale, Mask mask, T *y) {
  const U sign = as_bits(all(scale)) & 0x80000000u;
  const F size = abs(all(scale));
  const F lowest = all(-3.40282347e38f);  // so that of a row that is all -inf zeros follow, not NaN
  F highest[4] = {lowest, lowest, lowest, lowest};
  fours(0, count, [&](int k, int64_t i, auto lanes) {
    const F t = as_float(as_bits(load(x + i, lanes)) ^ sign);
    // In this order, NaN is passed over. The sum will be NaN.
    highest[k] = max(choose(counted(mask, i, lanes), t, lowest), highest[k]);
  });
  const F most = all(largest(max(max(highest[0], highest[1]), max(highest[2], highest[3]))));
  const auto power = [&](int64_t i, auto lanes) {
    const F t = as_float(as_bits(load(x + i, lanes)) ^ sign);
    return choose(counted(mask, i, lanes), exp_or_zero((t - most) * size), F{});
  };
  F sums[4] = {};
  alignas(64) float room[std::is_same<T, float>::value ? 1 : KEPT];
  float *powers = count <= KEPT ? room : nullptr;
  if constexpr (std::is_same<T, float>::value) powers = y;
  fours(0, count, [&](int k, int64_t i, auto lanes) {
    const F e = power(i, lanes);
    sums[k] += e;
    if (powers) store(powers + i, e, lanes);
  });
  const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const float part = total == 0.0f ? 0.0f : 1.0f / total;
  vectors(0, count, [&](int64_t i, auto lanes) {
    store(y + i, (powers ? load(powers + i, lanes) : power(i, lanes)) * part, lanes);
  });
  memset((void *)(y + count), 0, (keys - count) * sizeof *y);
}

struct Scores { int64_t batch, heads, queries, keys; };
struct Mask {
  const uint8_t *bytes;
  int64_t batch_stride, head_stride, query_stride;
};

template <class T>
void forward(Scores is, const T *x, float scale, bool causal, Mask mask, T *y) {
  parallel(is.batch * is.heads * is.queries, 1, 4 * is.keys, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t t = row % is.queries, h = row / is.queries % is.heads;
      const int64_t b = row / is.queries / is.heads;
      const int64_t last = causal ? t + is.keys - is.queries + 1 : is.keys;
      const int64_t count = last < 0 ? 0 : last < is.keys ? last : is.keys;
      const T *from = x + row * is.keys;
      T *to = y + row * is.keys;
      if (mask.bytes) {
        const uint8_t *bytes = mask.bytes + b * mask.batch_stride + h * mask.head_stride;
        forward_row(count, is.keys, from, scale, Some{bytes + t * mask.query_stride}, to);
      } else {
        forward_row(count, is.keys, from, scale, All{}, to);
      }
    }
  });
}

template <class T>
void backward(int64_t rows, int64_t cols, const T *dy, const T *y, float scale, T *dx) {
  parallel(rows, 1, 2 * cols, [=](int64_t begin, int64_t end) {
    for (int64_t at = begin * cols; at < end * cols; at += cols) {
      F sums[4] = {};
      fours(at, at + cols, [&](int k, int64_t i, auto lanes) {
        sums[k] += load(dy + i, lanes) * load(y + i, lanes);
      });
      const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
      vectors(at, at + cols, [&](int64_t i, auto lanes) {
        store(dx + i, scale * (load(y + i, lanes) * (load(dy + i, lanes) - total)), lanes);
      });
    }
  });
}

}  // namespace

BT_API int bt_softmax_forward(int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                              const void *x, float scale, int causal, const uint8_t *mask,
                              int64_t mask_batch_stride, int64_t mask_head_stride,
                              int64_t mask_query_stride, void *y, int dtype, int, void *) {
  if (keys == 0) return BT_OK;
  const Mask allowed = {mask, mask_batch_stride, mask_head_stride, mask_query_stride};
  BT_DISPATCH(dtype, T, forward({batch, heads, queries, keys}, (const T *)x, scale, causal, allowed,
                                (T *)y))
  return BT_OK;
}

BT_API int bt_softmax_backward(int64_t rows, int64_t cols, const void *dy, const void *y,
                               float scale, void *dx, int dtype, int, void *) {
  if (cols == 0) return BT_OK;
  BT_DISPATCH(dtype, T, backward(rows, cols, (const T *)dy, (const T *)y, scale, (T *)dx))
  return BT_OK;
}
