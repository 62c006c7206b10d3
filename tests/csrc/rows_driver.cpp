// The row kernels behind C names, for test_rows.py. Compiled with -DHICL_VEC_BYTES for each vector width.
#define HICL_ISA under_test
#include "cpu/rows_impl.h"

using Kernels = hicl::RowKernels<REAL>;
static const Kernels k = hicl::under_test::table<REAL>();

extern "C" {
REAL dot(const REAL* a, const REAL* b, int64_t d) { return k.dot(a, b, d); }
void scale(const REAL* x, REAL factor, REAL* out, int64_t d) { k.scale(x, factor, out, d); }
void add_scaled(const REAL* x, REAL factor, REAL* y, int64_t d) { k.add_scaled(x, factor, y, d); }
void dots(const REAL* x, const REAL* y, int64_t count, REAL* out, int64_t d) {
  const REAL* rows[8];
  for (int64_t t = 0; t < count; ++t) rows[t] = y + t * d;
  k.dots(x, rows, count, out, d);
}
void add_rows(REAL* y, const REAL* x, const REAL* factor, int64_t count, int64_t from, int64_t d) {
  const REAL* rows[8];
  for (int64_t t = 0; t < count; ++t) rows[t] = x + t * (from + d);
  k.add_rows(y, rows, factor, count, from, d);
}
void combine(REAL* gradient, REAL g, REAL a, const REAL* x, REAL b, const REAL* y, int64_t d) {
  k.combine(gradient, g, a, x, b, y, d);
}
REAL to_logits(REAL* row, const REAL* scale, REAL factor, int64_t n) { return k.to_logits(row, scale, factor, n); }
REAL exp_in_place(REAL* row, const REAL* scale, REAL offset, int64_t n) { return k.exp_in_place(row, scale, offset, n); }
REAL exp_in_place_with_moment(REAL* row, const REAL* scale, REAL offset, int64_t n, REAL* moment) {
  return k.exp_in_place_with_moment(row, scale, offset, n, moment);
}
REAL exp_sum(const REAL* row, REAL offset, int64_t n) { return k.exp_sum(row, offset, n); }
REAL exp_of_difference(REAL* row, REAL offset, REAL scale, int64_t n) { return k.exp_of_difference(row, offset, scale, n); }
REAL largest(const REAL* row, int64_t n, int64_t* index) { return k.largest(row, n, index); }
void column_largest(const REAL* rows, int64_t count, REAL* best, hicl::RowIndex<REAL>* at, int64_t n) {
  k.column_largest(rows, n, count, best, at, n);
}
void column_max(const REAL* row, REAL* best, int64_t n) { k.column_max(row, best, n); }
void column_exp_sum(const REAL* row, const REAL* best, REAL* total, int64_t n) { k.column_exp_sum(row, best, total, n); }
}
