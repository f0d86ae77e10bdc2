// What all CPU kernels share: vectors of LANES floats, storage types, fixed sums, threads.
//
// A kernel is written once, on vectors as wide as a register, and compiled once for each instruction
// set into a library of its own. No torch headers, no allocation. In the folders optimizer/ and
// compression/ products and sums are not fused (-ffp-contract=off), so that all instruction sets
// give the same bits; model/ may fuse.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bt_abi.h"

namespace bt {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2, NEON
#endif
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));  // also of a comparison: 0 or -1
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));   // halves, as bits
typedef double D __attribute__((vector_size(4 * LANES)));     // half as many doubles

struct BF16 { uint16_t bits; };
struct FP16 { uint16_t bits; };
struct None {};  // an output that nobody wants: storing to it does nothing

inline F all(float x) { return F{} + x; }
// Numbers from `first` (up to 16) on, one a lane.
inline I counting(int first) {
  static constexpr int32_t number[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                         11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                         22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  I numbers;
  memcpy(&numbers, number + first, sizeof numbers);
  return numbers;
}
inline U as_bits(F x) { return (U)x; }
inline F as_float(U x) { return (F)x; }
inline F choose(I mask, F yes, F no) { return mask ? yes : no; }
// a > b ? a : b, and a < b ? a : b: of NaN, b. (With a constant, g++ makes two instructions of that.)
inline F max(F a, F b) {
#if defined(__AVX512F__)
  return (F)__builtin_ia32_maxps512_mask((__m512)a, (__m512)b, (__m512)b, -1, 4);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
inline F min(F a, F b) {
#if defined(__AVX512F__)
  return (F)__builtin_ia32_minps512_mask((__m512)a, (__m512)b, (__m512)b, -1, 4);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
inline F abs(F x) { return as_float(as_bits(x) & 0x7fffffffu); }
inline F sqrt(F x) {
#if defined(__AVX512F__)
  return (F)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (F)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (F)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
inline F copysign(F size, F sign) {
  return as_float((as_bits(size) & 0x7fffffffu) | (as_bits(sign) & 0x80000000u));
}

// -- conversions: to nearest even, as torch does ---------------------------------------------------

inline F widen(H h, BF16) { return as_float(__builtin_convertvector(h, U) << 16); }

inline H narrow(F x, BF16) {
  const U u = as_bits(x);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const I nan = x != x;
  return __builtin_convertvector(nan ? (U{} + 0x7fc0u) : rounded, H);
}

inline F widen(H h, FP16) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps((__m128i)h);
#else
  // Shift into place, and let a product with 2^112 move the exponent (subnormals too).
  const U u = __builtin_convertvector(h, U);
  const U shifted = (u & 0x7fffu) << 13;
  const F scaled = as_float(shifted) * 0x1p112f;
  const I special = (I)(shifted >= 0x0f800000u);
  const U size = special ? (shifted | 0x7f800000u) : as_bits(scaled);
  return as_float(size | ((u & 0x8000u) << 16));
#endif
}

inline H narrow(F x, FP16) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const U u = as_bits(x), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
  const U normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // Below the smallest normal half, a sum with 0.5 puts the bits in place and rounds them.
  const U small = as_bits(as_float(size) + 0.5f) - 0x3f000000u;
  U out = (I)(size < 0x38800000u) ? small : normal;
  out = (I)(size >= 0x47800000u) ? U{} + 0x7c00u : out;
  out = (I)(size > 0x7f800000u) ? (0x7e00u | ((size >> 13) & 0x3ffu)) : out;
  return __builtin_convertvector(out | sign, H);
#endif
}

// -- memory: whole vectors, and the part of one at the end -----------------------------------------

struct Whole {};             // all lanes
struct Part { int count; };  // the first `count` of them; the others read as zero

inline F load(const float *p, Whole) {
  F x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline F load(const float *p, Part part) {
  F x{};
  memcpy(&x, p, part.count * sizeof *p);
  return x;
}
template <class T> inline F load(const T *p, Whole) {
  H h;
  memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <class T> inline F load(const T *p, Part part) {
  H h{};
  memcpy(&h, p, part.count * sizeof *p);
  return widen(h, T{});
}
inline void store(float *p, F x, Whole) { memcpy(p, &x, sizeof x); }
inline void store(float *p, F x, Part part) { memcpy(p, &x, part.count * sizeof *p); }
template <class T> inline void store(T *p, F x, Whole) {
  const H h = narrow(x, T{});
  memcpy(p, &h, sizeof h);
}
template <class T> inline void store(T *p, F x, Part part) {
  const H h = narrow(x, T{});
  memcpy(p, &h, part.count * sizeof *p);
}
inline void store(None *, F, Whole) {}
inline void store(None *, F, Part) {}

// One element.
template <class T> inline float get(const T *p) { return load(p, Part{1})[0]; }
template <class T> inline void set(T *p, float x) { store(p, all(x), Part{1}); }

// body(i, lanes) for every vector of elements [begin, end); `lanes` is Whole, or Part at the end.
template <class Body> inline void vectors(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) body(i, Whole{});
  if (i < end) body(i, Part{int(end - i)});
}

// As vectors, but with a number: body(number, i, lanes), 0 to 3 by turns. For sums in four variables,
// so that an addition need not wait for the one before. What is left over has number 0.
template <class Body> inline void fours(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + 4 * LANES <= end; i += 4 * LANES) {
    body(0, i, Whole{});
    body(1, i + LANES, Whole{});
    body(2, i + 2 * LANES, Whole{});
    body(3, i + 3 * LANES, Whole{});
  }
  vectors(i, end, [&](int64_t k, auto lanes) { body(0, k, lanes); });
}

// -- sums and maxima over lanes --------------------------------------------------------------------

// Halves are combined with each other, until one lane is left. (A shuffle a step: g++ makes a walk
// through memory of a loop over lanes.)
template <class Combine> inline float fold(F x, Combine combine) {
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2)
    x = combine(x, __builtin_shuffle(x, counting(width)));  // of what is behind the end, nothing counts
  return x[0];
}
inline float sum(F x) {
  return fold(x, [](F a, F b) { return a + b; });
}
inline float largest(F x) {
  return fold(x, [](F a, F b) { return max(a, b); });
}

// 64 sums whatever the width of a register: element j is added to sum j % 64. The total is the same
// on every machine: halves are added to each other.
struct Sum64 {
  F lane[64 / LANES] = {};

  // x: elements j to j + LANES, where j is a multiple of LANES.
  void add(int64_t j, F x) { lane[j / LANES % (64 / LANES)] += x; }

  float total() const {
    F all[64 / LANES];
    memcpy(all, lane, sizeof lane);
    for (int width = 32 / LANES; width; width /= 2)
      for (int i = 0; i < width; i++) all[i] += all[i + width];
    return sum(all[0]);
  }
};

// Halves of 16 numbers added to each other, until one is left.
inline double halved(double (&all)[16]) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) all[i] += all[i + width];
  return all[0];
}

// The first and the second half of x as doubles. (g++ takes the way through memory of itself.)
inline D widen_low(F x) {
#if defined(__AVX512F__)
  return (D)_mm512_maskz_cvtps_pd(0xff, _mm512_castps512_ps256((__m512)x));
#elif defined(__AVX2__)
  return (D)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
#elif defined(__SSE2__)
  return (D)_mm_cvtps_pd((__m128)x);
#else
  return D{x[0], x[1]};
#endif
}
inline D widen_high(F x) {
#if defined(__AVX512F__)
  return (D)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1));
#elif defined(__AVX2__)
  return (D)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#elif defined(__SSE2__)
  return (D)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
#else
  return D{x[2], x[3]};
#endif
}

// 16 sums of squares in fp64, element j to sum j % 16; halves are added to each other.
struct Squares16 {
  static constexpr int HALF = LANES / 2;
  D lane[16 / HALF] = {};

  // x: 16 elements.
  void add(const F (&x)[16 / LANES]) {
    for (int k = 0; k < 16 / LANES; k++) {
      const D low = widen_low(x[k]), high = widen_high(x[k]);
      lane[2 * k] += low * low;
      lane[2 * k + 1] += high * high;
    }
  }

  double total() const {
    double all[16];
    memcpy(all, lane, sizeof lane);
    return halved(all);
  }
};

// 16 elements, of which the first `count` are there; the others are zero.
template <class T> inline void load16(const T *p, int64_t count, F (&x)[16 / LANES]) {
  for (int k = 0; k < 16 / LANES; k++) {
    const int64_t left = count - k * LANES;
    x[k] = left >= LANES ? load(p + k * LANES, Whole{})
                         : load(p + k * LANES, Part{left > 0 ? int(left) : 0});
  }
}

// Makes the elements behind the first `count` zero again.
inline void clear_behind(int64_t count, F (&x)[16 / LANES]) {
  for (int64_t k = count; k < 16; k++) x[k / LANES][k % LANES] = 0.0f;
}
template <class T> inline void store16(T *p, int64_t count, const F (&x)[16 / LANES]) {
  for (int k = 0; k < 16 / LANES; k++) {
    const int64_t left = count - k * LANES;
    if (left >= LANES) store(p + k * LANES, x[k], Whole{});
    else store(p + k * LANES, x[k], Part{left > 0 ? int(left) : 0});
  }
}

// -- threads ---------------------------------------------------------------------------------------

// body(begin, end) for parts of [0, n), on all threads if that is worth it. Parts begin at multiples
// of `unit`; `work` is about how many elements one of n costs.
template <class Body>
inline void parallel(int64_t n, int64_t unit, int64_t work, Body body) {
  const int64_t units = (n + unit - 1) / unit;
  int64_t threads = omp_get_max_threads();
  const int64_t enough = n * work / 16384;  // fewer elements a thread cost more to hand out than to do
  threads = threads < enough ? threads : enough;
  threads = threads < units ? threads : units;
  if (threads <= 1) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t begin = units * me / all * unit;
    const int64_t stop = units * (me + 1) / all * unit;
    const int64_t end = stop < n ? stop : n;
    if (begin < end) body(begin, end);
  }
}

}  // namespace bt

// Runs the statement with T as the storage type that `dtype` stands for, or returns BT_BAD_ARGUMENT.
#define BT_DISPATCH(dtype, T, ...)                        \
  switch (dtype) {                                        \
    case BT_FP32: { using T = float; __VA_ARGS__; break; }    \
    case BT_BF16: { using T = bt::BF16; __VA_ARGS__; break; } \
    case BT_FP16: { using T = bt::FP16; __VA_ARGS__; break; } \
    default: return BT_BAD_ARGUMENT;                      \
  }

// The same, with bt::None for a null pointer.
#define BT_DISPATCH_IF(pointer, dtype, T, ...)                       \
  if (pointer) { BT_DISPATCH(dtype, T, __VA_ARGS__) }                \
  else { using T = bt::None; __VA_ARGS__; }
