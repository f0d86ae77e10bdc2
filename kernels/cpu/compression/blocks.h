// What the compression kernels share: blocks with a scale, which are walked in groups of 64 elements.
#pragma once
#include <limits>
#include <type_traits>

#include "bt_cpu.h"

namespace bt {

constexpr int GROUP = 64, VECTORS = GROUP / LANES;

inline bool are_blocks(int64_t n, int64_t block, int scale_dtype = BT_FP32) {
  return n >= 0 && block > 0 && block % GROUP == 0 &&
         (scale_dtype == BT_FP32 || scale_dtype == BT_BF16);
}

// Scales as they are on the wire, at any address.
struct Scales {
  char *at;
  int dtype;

  Scales(const void *at, int dtype) : at((char *)at), dtype(dtype) {}

  float get(int64_t i) const {
    if (dtype == BT_FP32) return bt::get((const float *)at + i);
    uint16_t high;
    memcpy(&high, at + 2 * i, sizeof high);
    const uint32_t bits = uint32_t(high) << 16;
    float s;
    memcpy(&s, &bits, sizeof s);
    return s;
  }
  // Keeps the scale of block i and returns it as kept: rounded, and NaN if that is not finite.
  float put(int64_t i, float s) const {
    keep(i, s);
    if (std::isfinite(get(i))) return get(i);
    keep(i, std::numeric_limits<float>::quiet_NaN());
    return get(i);
  }

 private:
  void keep(int64_t i, float s) const {
    if (dtype == BT_FP32) set((float *)at + i, s);
    else set((BF16 *)at + i, s);
  }
};

// body(j, lanes) for every group of elements [begin, end); `lanes` is Whole, or Part at the end.
template <class Body> inline void groups(int64_t begin, int64_t end, Body body) {
  int64_t j = begin;
  for (; j + GROUP <= end; j += GROUP) body(j, Whole{});
  if (j < end) body(j, Part{int(end - j)});
}

// The lanes of vector k of a group.
inline Whole lanes_of(Whole, int) { return {}; }
inline Part lanes_of(Part group, int k) {
  const int left = group.count - k * LANES;
  return {left < 0 ? 0 : left < LANES ? left : LANES};
}

// body(i, k, lanes) for every vector k of the group at j: its elements are those from i on.
template <class Lanes, class Body> inline void each_vector(int64_t j, Lanes lanes, Body body) {
#pragma GCC unroll 16
  for (int k = 0; k < VECTORS; k++) body(j + k * LANES, k, lanes_of(lanes, k));
}

// x with zeros in the lanes that are not there.
template <class V> inline V only(V x, Whole) { return x; }
template <class V> inline V only(V x, Part part) {
  V y{};
  memcpy(&y, &x, part.count * sizeof x[0]);
  return y;
}

// body(from, to, b) for every block b of elements [begin, end).
template <class Body>
inline void each_block(int64_t begin, int64_t end, int64_t block, Body body) {
  for (int64_t from = begin; from < end; from += block)
    body(from, end - from < block ? end : from + block, from / block);
}
// The same of [0, n), on all threads.
template <class Body> inline void all_blocks(int64_t n, int64_t block, int64_t work, Body body) {
  parallel(n, block, work,
           [=](int64_t begin, int64_t end) { each_block(begin, end, block, body); });
}

// Stores to whole vectors past the cache, where what is stored is too large for it: memory that is
// only written is then not read first.
template <class T> struct Output {
  T *at;
  bool streams;

  Output(T *at, int64_t n) : at(at), streams(false) {
#if defined(__SSE2__)
    constexpr int64_t LARGE = 16 << 20;
    streams = std::is_same_v<T, float> && n * 4 >= LARGE && (uintptr_t)at % sizeof(F) == 0;
#endif
  }
  void put(int64_t i, F x, Whole lanes) const {
    if (streams) stream((float *)at + i, x);
    else store(at + i, x, lanes);
  }
  void put(int64_t i, F x, Part lanes) const { store(at + i, x, lanes); }
  // What was stored is there for other threads.
  void done() const {
#if defined(__SSE2__)
    if (streams) _mm_sfence();
#endif
  }

 private:
  static void stream([[maybe_unused]] float *p, [[maybe_unused]] F x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)x);
#endif
  }
};

// out = weight * sums over sources. add(sum, k, j, s, lanes) adds to the vectors of `sum` what source
// k has for the group at j, where its scale is s.
template <class T, class Add>
inline void weighted_sums(int64_t n, int64_t block, int64_t num_sources, const void *scales,
                          int64_t scales_stride, int scale_dtype, float weight, T *out, Add add) {
  const Output<T> output(out, n);
  parallel(n, block, num_sources + 1, [=](int64_t begin, int64_t end) {
    each_block(begin, end, block, [=](int64_t from, int64_t to, int64_t b) {
      groups(from, to, [=](int64_t j, auto lanes) {
        F sum[VECTORS] = {};
        for (int64_t k = 0; k < num_sources; k++) {
          const Scales of_source{(const char *)scales + k * scales_stride, scale_dtype};
          add(sum, k, j, of_source.get(b), lanes);
        }
        each_vector(j, lanes, [&](int64_t i, int k, auto part) {
          output.put(i, sum[k] * weight, part);
        });
      });
    });
    output.done();
  });
}

}  // namespace bt
