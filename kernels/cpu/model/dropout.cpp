// residual + dropout(x + bias) in one pass. Random numbers are computed where they are needed and
// never stored: Philox-4x32-10, https://doi.org/10.1145/2063384.2063405
#include "bt_cpu.h"

using namespace bt;

namespace {

constexpr int GROUP = 64;  // elements that 16 neighbouring counters draw for
constexpr int ROUNDS = 10;

// Half as many 64-bit lanes. Philox works on their lower halves; the upper ones hold leftovers.
typedef uint64_t L __attribute__((vector_size(4 * LANES)));

// The product of the lower halves.
inline L product(L a, L b) {
#if defined(__AVX512F__)
  return (L)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (L)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (L)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

struct Keys {
  uint32_t first[ROUNDS], second[ROUNDS];

  explicit Keys(uint64_t key) {
    for (int r = 0; r < ROUNDS; r++) {
      first[r] = uint32_t(key) + 0x9e3779b9u * r;
      second[r] = uint32_t(key >> 32) + 0xbb67ae85u * r;
    }
  }
};

// The upper halves, moved down. (Not a shift, which waits for the same port as products.)
inline L upper(L x) {
#if defined(__AVX512F__)
  return (L)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  return (L)_mm256_shuffle_epi32((__m256i)x, 0xf5);
#elif defined(__SSE2__)
  return (L)_mm_shuffle_epi32((__m128i)x, 0xf5);
#else
  return x >> 32;
#endif
}

// The four words of the counters (low, high, 0, 0), in the lower halves. `high` is one number, so
// in the first two rounds one product of two is one number, too.
inline void philox(L low, uint32_t high, const Keys &keys, L (&word)[4]) {
  const L m0 = L{} + 0xd2511f53u, m1 = L{} + 0xcd9e8d57u;
  const L p = product(low, m0);
  const uint64_t second = uint64_t(high ^ keys.first[0]) * 0xd2511f53u;
  L c = upper(p) ^ (L{} + keys.second[0]);
  const L q = product(c, m1);
  L a = upper(q) ^ (L{} + keys.first[1]), b = q, d = L{} + second;
  c = p ^ (L{} + (uint32_t(second >> 32) ^ keys.second[1]));
#pragma GCC unroll 10
  for (int r = 2; r < ROUNDS; r++) {
    const L left = product(a, m0), right = product(c, m1);
    a = upper(right) ^ b ^ (L{} + keys.first[r]);
    c = upper(left) ^ d ^ (L{} + keys.second[r]);
    b = right;
    d = left;
  }
  word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

// The random words of the elements of group number `group` of a sample.
inline void draw(uint64_t group, const Keys &keys, uint32_t *words) {
  const L step = (L)counting(0) & 0xffffffffu;  // 0, 2, 4, ...
  const uint32_t high = group >> 28;  // counters of a group differ in their lowest four bits only
#pragma GCC unroll 4
  for (int first = 0; first < 16; first += LANES) {
    L even[4], odd[4];
    const L low = step + (uint32_t(group << 4) + first);
    philox(low, high, keys, even);
    philox(low + 1, high, keys, odd);
    for (int w = 0; w < 4; w++) {
      const L both = (even[w] & 0xffffffffu) | (odd[w] << 32);
      memcpy(words + 16 * w + first, &both, sizeof both);
    }
  }
}

struct Dropping { uint32_t threshold; float keep_scale; };

// A stretch of a sample: elements [e, e + count), with pointers to the first of them; bias and
// residual may be null.
template <class T>
void stretch(uint64_t e, int64_t count, const T *x, const T *bias, const T *residual, T *out,
             const Keys &keys, Dropping with) {
  alignas(64) uint32_t words[GROUP + LANES] = {};  // vectors may reach beyond the group
  for (int64_t done = 0; done < count;) {
    const int64_t skip = (e + done) % GROUP;
    const int64_t here = count - done < GROUP - skip ? count - done : GROUP - skip;
    draw((e + done) / GROUP, keys, words);
    const auto body = [&](int64_t i, auto lanes) {
      U word;
      memcpy(&word, words + skip + i, sizeof word);
      F y = load(x + done + i, lanes);
      if (bias) y += load(bias + done + i, lanes);
      y = choose((I)(word < with.threshold), F{}, y * with.keep_scale);
      if (residual) y += load(residual + done + i, lanes);
      store(out + done + i, y, lanes);
    };
    if (here == GROUP) vectors(0, GROUP, body);  // a loop of known length
    else vectors(0, here, body);
    done += here;
  }
}

struct Shape { int64_t samples, outer, inner, full_inner, offset, cols; };

template <class T>
void dropout(Shape is, const T *x, const T *bias, const T *residual, const int64_t *seeds,
             int64_t salt, Dropping with, T *out) {
  const int64_t row = bias ? is.cols : is.inner;  // what a stretch must not cross
  parallel(is.samples * is.outer * is.inner, GROUP, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t sample = i / is.inner / is.outer, o = i / is.inner % is.outer;
      const int64_t column = i % is.inner, left = row - column % row;
      const int64_t count = left < end - i ? left : end - i;
      const Keys keys(uint64_t(seeds[sample]) + uint64_t(salt));
      const uint64_t e = uint64_t(o) * is.full_inner + is.offset + column;
      stretch(e, count, x + i, bias ? bias + column % row : nullptr,
              residual ? residual + i : nullptr, out + i, keys, with);
      i += count;
    }
  });
}

}  // namespace

BT_API int bt_bias_dropout_residual(int64_t samples, int64_t outer, int64_t inner,
                                    int64_t full_inner, int64_t offset, int64_t cols, const void *x,
                                    const void *bias, const void *residual, const int64_t *seeds,
                                    int64_t salt, uint32_t threshold, float keep_scale, void *out,
                                    int dtype, int, void *) {
  if (samples == 0 || outer == 0 || inner == 0) return BT_OK;
  if (bias && (cols <= 0 || inner % cols)) return BT_BAD_ARGUMENT;
  Shape is = {samples, outer, inner, full_inner, offset, cols};
  if (inner == full_inner) is = {samples, 1, outer * inner, outer * inner, 0, cols};
  BT_DISPATCH(dtype, T, dropout(is, (const T *)x, (const T *)bias, (const T *)residual, seeds, salt,
                                Dropping{threshold, keep_scale}, (T *)out))
  return BT_OK;
}
