// The sum of squares of many tensors and whether they are finite; divided on the way if asked to.
#include "bt_cpu.h"

using namespace bt;

namespace {

constexpr int64_t PART = 1024, CHUNK = 64 * PART;

struct Found {
  double squares, not_finite;
};

// Sums in 16 lanes: item j to lane j % 16, then halves added to each other.
class Sum16 {
 public:
  void add(double item) { lane_[next_++ % 16] += item; }
  double total() const {
    double all[16];
    memcpy(all, lane_, sizeof lane_);
    return halved(all);
  }

 private:
  double lane_[16] = {};
  unsigned next_ = 0;
};

template <bool DIVIDE, class T>
double squares_of(T *x, int64_t count, float divisor, bool write, I &bad) {
  Squares16 squares;
  const auto look = [&](int64_t i, int64_t here) {
    F value[16 / LANES];
    load16(x + i, here, value);
    if (DIVIDE) {
      for (F &v : value) v /= divisor;
      if (here < 16) clear_behind(here, value);  // 0 / 0
    }
    for (const F v : value) bad -= !(abs(v) <= 3.402823466e38f);  // a lane that is true is -1
    squares.add(value);
    if (DIVIDE && write) store16(x + i, here, value);
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) look(i, 16);
  if (i < count) look(i, count - i);
  return squares.total();
}

template <bool DIVIDE, class T> Found look_at(T *x, int64_t count, float divisor, bool write) {
  Sum16 parts;
  I bad{};
  for (int64_t i = 0; i < count; i += PART)
    parts.add(squares_of<DIVIDE>(x + i, count - i < PART ? count - i : PART, divisor, write, bad));
  double not_finite = 0.0;
  for (int k = 0; k < LANES; k++) not_finite += bad[k];
  return {parts.total(), not_finite};
}

int64_t chunks_of(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

// Chunks [begin, end) of all chunks of all tensors.
template <class T>
void look_at_chunks(int64_t begin, int64_t end, void *const *pointers, const int64_t *sizes,
                    const float *divisor, bool write, Found *found) {
  int64_t t = 0, first = 0;  // tensor, and its first chunk
  for (int64_t chunk = begin; chunk < end; chunk++) {
    while (chunk - first >= chunks_of(sizes[t])) first += chunks_of(sizes[t++]);
    const int64_t start = (chunk - first) * CHUNK, left = sizes[t] - start;
    T *const x = (T *)pointers[t] + start;
    const int64_t count = left < CHUNK ? left : CHUNK;
    found[chunk] = divisor ? look_at<true>(x, count, *divisor, write)
                           : look_at<false>(x, count, 1.0f, false);
  }
}

}  // namespace

BT_API int bt_grad_norm(int64_t num_tensors, void *const *pointers, const int64_t *sizes, int dtype,
                        const float *divisor, int write, double *workspace, double *out, int,
                        void *) {
  Found *const found = (Found *)workspace;
  int64_t num_chunks = 0;
  for (int64_t t = 0; t < num_tensors; t++) num_chunks += chunks_of(sizes[t]);
  BT_DISPATCH(dtype, T, parallel(num_chunks, 1, CHUNK, [=](int64_t begin, int64_t end) {
    look_at_chunks<T>(begin, end, pointers, sizes, divisor, write, found);
  }))
  Sum16 squares, not_finite;
  for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
    squares.add(found[chunk].squares);
    not_finite.add(found[chunk].not_finite);
  }
  out[0] = squares.total();
  out[1] = not_finite.total();
  return BT_OK;
}
