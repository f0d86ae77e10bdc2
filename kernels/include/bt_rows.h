// What CPU kernels on rows share: sums over a row, pieces of rows, sums of columns over all rows.
#pragma once
#include "bt_cpu.h"

namespace bt {

// -- a row -----------------------------------------------------------------------------------------

// Zero in the lanes that are not there.
inline F only(F x, Whole) { return x; }
inline F only(F x, Part part) {
  F kept{};
  memcpy(&kept, &x, part.count * sizeof(float));
  return kept;
}

// The sum over a row of term(i, lanes), in four vectors of sums, so that none waits for the last.
template <class Term> inline float total_of(int64_t cols, Term term) {
  F a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * LANES <= cols; i += 4 * LANES) {
    a += term(i, Whole{});
    b += term(i + LANES, Whole{});
    c += term(i + 2 * LANES, Whole{});
    d += term(i + 3 * LANES, Whole{});
  }
  vectors(i, cols, [&](int64_t j, auto lanes) { a += only(term(j, lanes), lanes); });
  return sum((a + b) + (c + d));
}

// -- many rows -------------------------------------------------------------------------------------

// body(row, begin, end) for columns [begin, end) of every row, on all threads.
template <class Body>
inline void parallel_rows(int64_t rows, int64_t cols, int64_t work, Body body) {
  parallel(rows * cols, 64, work, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin / cols; row * cols < end; row++) {
      const int64_t first = begin - row * cols, last = end - row * cols;
      body(row, first > 0 ? first : 0, last < cols ? last : cols);
    }
  });
}

// -- sums of columns: rows in chunks, whose number depends on nothing but their number ---------------

inline int64_t num_chunks(int64_t rows) {
  const int64_t chunks = (rows + 63) / 64;
  return chunks < 64 ? chunks : 64;
}

// body(chunk, first row, last row + 1) on all threads; `work` is that of a row.
template <class Body> inline void parallel_chunks(int64_t rows, int64_t work, Body body) {
  const int64_t chunks = num_chunks(rows);
  parallel(chunks, 1, rows * work / (chunks ? chunks : 1), [=](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++)
      body(chunk, rows * chunk / chunks, rows * (chunk + 1) / chunks);
  });
}

// out[i] = the sum over chunks, in order, of part[chunk * stride + i]; nothing if out is null.
inline void add_chunks(int64_t chunks, int64_t stride, int64_t cols, const float *part, float *out) {
  if (!out) return;
  parallel(cols, 64, chunks, [=](int64_t begin, int64_t end) {
    vectors(begin, end, [=](int64_t i, auto lanes) {
      F sum{};
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        sum += load(part + chunk * stride + i, lanes);
      store(out + i, sum, lanes);
    });
  });
}

}  // namespace bt
