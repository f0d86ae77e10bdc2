// Quantisation of blocks to 4 or 8 bits, with error feedback or as the change of a replica.
#include "blocks.h"

using namespace bt;

namespace {

typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));  // neighbouring lanes of an I
typedef uint8_t HalfBytes __attribute__((vector_size(LANES / 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

// Bytes as wider numbers. The compiler would go by way of halves of vectors.
inline I widen(Bytes x) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepi8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)x));
#else
  return __builtin_convertvector(x, I);
#endif
}
inline Pairs widen(HalfBytes x) {
#if defined(__AVX512F__)
  return (Pairs)_mm512_cvtepu8_epi64(_mm_cvtsi64_si128((int64_t)x));
#elif defined(__AVX2__)
  return (Pairs)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int32_t)x));
#else
  return __builtin_convertvector(x, Pairs);
#endif
}

// How whole numbers q, in the lanes of a vector, are kept in BITS each. Lanes that are not there
// become zero bits.
template <int BITS> struct Codes;

template <> struct Codes<8> {
  static constexpr int MOST = 127;
  typedef Bytes Packed;
  template <class Lanes> static Packed pack(I q, Lanes lanes) {
    return __builtin_convertvector(only(q, lanes), Packed);
  }
  static I unpack(Packed packed) { return widen(packed); }
};

template <> struct Codes<4> {
  static constexpr int MOST = 7;
  typedef HalfBytes Packed;
  template <class Lanes> static Packed pack(I q, Lanes lanes) {
    const Pairs pairs = (Pairs)only(q + 8, lanes);
    return __builtin_convertvector(pairs | pairs >> 28, Packed);
  }
  static I unpack(Packed packed) {
    const Pairs pairs = widen(packed);
    return (I)((pairs | pairs << 28) & 0x0000000f0000000fu) - 8;
  }
};

template <int BITS> inline int64_t bytes_of(int64_t elements) { return (elements * BITS + 7) / 8; }
template <int BITS> inline int64_t bytes_of(Whole) { return bytes_of<BITS>(LANES); }
template <int BITS> inline int64_t bytes_of(Part part) { return bytes_of<BITS>(part.count); }

// The numbers of elements i to i + LANES, where i is a multiple of LANES.
template <int BITS, class Lanes> inline F load_codes(const uint8_t *codes, int64_t i, Lanes lanes) {
  typename Codes<BITS>::Packed packed{};
  memcpy(&packed, codes + i * BITS / 8, bytes_of<BITS>(lanes));
  return __builtin_convertvector(Codes<BITS>::unpack(packed), F);
}
template <int BITS, class Lanes> inline void store_codes(uint8_t *codes, int64_t i, I q, Lanes lanes) {
  const auto packed = Codes<BITS>::pack(q, lanes);
  memcpy(codes + i * BITS / 8, &packed, bytes_of<BITS>(lanes));
}

// The largest |v| of a block, as bits: in their order NaN is above infinity.
template <class Value> inline float largest_of(int64_t begin, int64_t end, Value value) {
  I most[VECTORS] = {};
  I *const at = most;
  groups(begin, end, [=](int64_t j, auto lanes) {
    each_vector(j, lanes, [=](int64_t i, int k, auto part) {
      const I size = (I)abs(value(i, part));
      at[k] = size > at[k] ? size : at[k];
    });
  });
  int32_t of_all = 0;
  for (const I &some : most)
    for (int i = 0; i < LANES; i++) of_all = some[i] > of_all ? some[i] : of_all;
  float found;
  memcpy(&found, &of_all, sizeof found);
  return found;
}

// Quantises v = value(i, lanes). keep(i, v, change, lanes) is told of every v and its q * s.
template <int BITS, class Value, class Keep>
void quantize(int64_t n, int64_t block, Scales scales, uint8_t *codes, Value value, Keep keep) {
  all_blocks(n, block, 4, [=](int64_t begin, int64_t end, int64_t b) {
    constexpr float MOST = Codes<BITS>::MOST;
    const float s = scales.put(b, largest_of(begin, end, value) / MOST);
    if (s != s) {
      memset(codes + begin * BITS / 8, 0, bytes_of<BITS>(end - begin));
      return;
    }
    const float divisor = s == 0.0f ? std::numeric_limits<float>::infinity() : s;
    vectors(begin, end, [=](int64_t i, auto lanes) {
      const F ROUNDER = all(0x1.8p23f);  // a sum with it has no room for a fraction
      const F v = value(i, lanes);
      const F sum = min(max(v / divisor, all(-MOST)), all(MOST)) + ROUNDER;
      store_codes<BITS>(codes, i, (I)sum - (I)ROUNDER, lanes);
      keep(i, v, (sum - ROUNDER) * s, lanes);
    });
  });
}

template <int BITS, class T>
void quantize(int64_t n, int64_t block, const T *x, float *residual, Scales scales,
              uint8_t *codes) {
  const auto plain = [=](int64_t i, auto lanes) { return load(x + i, lanes); };
  if (!residual) return quantize<BITS>(n, block, scales, codes, plain, [](auto...) {});
  quantize<BITS>(
      n, block, scales, codes,
      [=](int64_t i, auto lanes) { return load(x + i, lanes) + load(residual + i, lanes); },
      [=](int64_t i, F v, F change, auto lanes) { store(residual + i, v - change, lanes); });
}

template <int BITS, class T>
void delta_pack(int64_t n, int64_t block, const float *main, T *replica, Scales scales,
                uint8_t *codes) {
  quantize<BITS>(
      n, block, scales, codes,
      [=](int64_t i, auto lanes) { return load(main + i, lanes) - load(replica + i, lanes); },
      [=](int64_t i, F, F change, auto lanes) {
        store(replica + i, load(replica + i, lanes) + change, lanes);
      });
}

template <int BITS, class T>
void delta_apply(int64_t n, int64_t block, const uint8_t *codes, Scales scales, T *replica) {
  all_blocks(n, block, 2, [=](int64_t begin, int64_t end, int64_t b) {
    const float s = scales.get(b);
    if (s != s) return;
    vectors(begin, end, [=](int64_t i, auto lanes) {
      const F change = load_codes<BITS>(codes, i, lanes) * s;
      store(replica + i, load(replica + i, lanes) + change, lanes);
    });
  });
}

template <int BITS, class T>
void dequantize_mean(int64_t n, int64_t block, int64_t num_sources, const uint8_t *codes,
                     int64_t codes_stride, const void *scales, int64_t scales_stride,
                     int scale_dtype, float weight, T *out) {
  const auto add = [=](F *sum, int64_t source, int64_t j, float s, auto lanes) {
    const uint8_t *const of_source = codes + source * codes_stride;
    each_vector(j, lanes, [=](int64_t i, int k, auto part) {
      sum[k] += load_codes<BITS>(of_source, i, part) * s;
    });
  };
  weighted_sums(n, block, num_sources, scales, scales_stride, scale_dtype, weight, out, add);
}

}  // namespace

// Runs the statement with BITS as the constant that num_bits is, or returns BT_BAD_ARGUMENT.
#define DISPATCH_BITS(num_bits, BITS, ...)                   \
  switch (num_bits) {                                        \
    case 4: { constexpr int BITS = 4; __VA_ARGS__; break; }  \
    case 8: { constexpr int BITS = 8; __VA_ARGS__; break; }  \
    default: return BT_BAD_ARGUMENT;                         \
  }

BT_API int bt_quantize(int64_t n, int64_t block, int num_bits, const void *x, int x_dtype,
                       float *residual, void *scales, int scale_dtype, uint8_t *codes, int,
                       void *) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  DISPATCH_BITS(num_bits, BITS,
                BT_DISPATCH(x_dtype, T, quantize<BITS>(n, block, (const T *)x, residual,
                                                       {scales, scale_dtype}, codes)))
  return BT_OK;
}

BT_API int bt_dequantize_mean(int64_t n, int64_t block, int num_bits, int64_t num_sources,
                              const uint8_t *codes, int64_t codes_stride, const void *scales,
                              int64_t scales_stride, int scale_dtype, float weight, void *out,
                              int out_dtype, int, void *) {
  if (!are_blocks(n, block, scale_dtype) || num_sources < 0) return BT_BAD_ARGUMENT;
  DISPATCH_BITS(num_bits, BITS,
                BT_DISPATCH(out_dtype, T,
                            dequantize_mean<BITS>(n, block, num_sources, codes, codes_stride,
                                                  scales, scales_stride, scale_dtype, weight,
                                                  (T *)out)))
  return BT_OK;
}

BT_API int bt_delta_pack(int64_t n, int64_t block, int num_bits, const float *main, void *replica,
                         int dtype, void *scales, int scale_dtype, uint8_t *codes, int, void *) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  DISPATCH_BITS(num_bits, BITS,
                BT_DISPATCH(dtype, T, delta_pack<BITS>(n, block, main, (T *)replica,
                                                       {scales, scale_dtype}, codes)))
  return BT_OK;
}

BT_API int bt_delta_apply(int64_t n, int64_t block, int num_bits, const uint8_t *codes,
                          const void *scales, int scale_dtype, void *replica, int dtype, int,
                          void *) {
  if (!are_blocks(n, block, scale_dtype)) return BT_BAD_ARGUMENT;
  DISPATCH_BITS(num_bits, BITS,
                BT_DISPATCH(dtype, T, delta_apply<BITS>(n, block, codes, {scales, scale_dtype},
                                                        (T *)replica)))
  return BT_OK;
}
