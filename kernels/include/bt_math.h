// exp, log, sigmoid, tanh and erf of vectors (bt_cpu.h), within 3 units in the last place of fp32
// over the whole range: infinities and denormals as C has them, NaN gives NaN. Polynomials on a
// reduced range; exp, log and tanh have those of Cephes (https://www.netlib.org/cephes), erf
// minimax fits of its own. No calls of libm.
#pragma once
#include "bt_cpu.h"

namespace bt {

// c[0] * x^(n-1) + ... + c[n-1].
template <int n> inline F polynomial(F x, const float (&c)[n]) {
  F sum = all(c[0]);
  for (int k = 1; k < n; k++) sum = sum * x + c[k];
  return sum;
}

// 1 / x for |x| from 1 to 2^100, within one unit in the last place.
inline F reciprocal(F x) {
#if defined(__AVX512F__)
  const F near = (F)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // 14 bits; Newton doubles them
  return near + near * (1.0f - x * near);
#else
  return 1.0f / x;
#endif
}

// x * 2^n for whole n from -252 to 254, rounded once if it is denormal.
inline F times_power(F x, F n) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
#else
  const I whole = __builtin_convertvector(n, I), half = whole >> 1;  // both powers are normal numbers
  return x * as_float(U(half + 127) << 23) * as_float(U(whole - half + 127) << 23);
#endif
}

// e^x = 2^n * e^r with |r| <= log(2) / 2; for x from -170 to 170.
inline F exp_bounded(F x) {
  constexpr float round = 0x1.8p23f;          // what is added to it is rounded to a whole number
  const F n = (x * 1.44269504f + round) - round;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const F p = polynomial(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                             4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f});
  return times_power((p * r * r + r) + 1.0f, n);
}

inline F exp(F x) {
  return exp_bounded(max(all(-104.0f), min(all(89.0f), x)));  // in this order, NaN stays
}

// As exp, but zero where that is denormal. Processors take a hundred times as long over a result
// that is denormal, or too small even for that, and of exp(-inf) there may be many.
inline F exp_or_zero(F x) {
  const F normal = exp_bounded(max(all(-87.3f), min(all(89.0f), x)));
  return choose(x < -87.3f, F{}, normal);
}

// log x = e * log 2 + log m with m from sqrt(1/2) to sqrt 2.
inline F log(F x) {
  const I denormal = x < 0x1p-126f;
  const U bits = as_bits(choose(denormal, x * 0x1p23f, x)) - 0x3f3504f3u;
  const F e = __builtin_convertvector((I)bits >> 23, F) - choose(denormal, all(23.0f), F{});
  const F m = as_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const F square = m * m;
  F y = polynomial(m, {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                       1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f,
                       3.3333331174e-1f}) * m * square;
  y = y - e * 2.12194440e-4f - 0.5f * square;
  y = m + y + e * 0.693359375f;
  y = choose(x > 0.0f, y, choose(x == 0.0f, all(-INFINITY), all(NAN)));
  return choose(x < INFINITY, y, x + x);  // infinity, NaN
}

// The sigmoid of x, which has full precision in its tail, and its derivative.
struct Logistic {
  F value, slope;
  explicit Logistic(F x) {
    const F t = exp_bounded(-min(all(104.0f), abs(x))), r = reciprocal(1.0f + t);
    value = choose(x < 0.0f, t, all(1.0f)) * r;
    slope = t * r * r;
  }
};

inline F sigmoid(F x) { return Logistic(x).value; }

inline F tanh(F x) {
  const F square = x * x, size = abs(x);
  const F near = polynomial(square, {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                     1.33314422036e-1f, -3.33332819422e-1f}) * square * size + size;
  const F far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return copysign(choose(size < 0.625f, near, far), x);
}

// erf(x) = x + x * p(x^2) near zero; farther out 1 - e^(-|x| + |x| * q(|x|)).
inline F erf(F x) {
  const F square = x * x, size = abs(x);
  const F near = polynomial(square, {-5.990892532e-4f, 4.993189126e-3f, -2.676662430e-2f,
                                     1.128181666e-1f, -3.761249483e-1f, 1.283791512e-1f}) * size + size;
  const F t = min(all(4.0f), size);  // of NaN, NaN
  const F q = polynomial(t, {2.139230490e-4f, -3.214444499e-3f, 2.288832143e-2f, -1.052592769e-1f,
                             -6.357202530e-1f, -1.285137832e-1f});
  const F far = 1.0f - exp(q * t - t);
  return copysign(choose(size < 0.921875f, near, far), x);
}

}  // namespace bt
