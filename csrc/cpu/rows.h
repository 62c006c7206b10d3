// Arithmetic on single rows, compiled once per instruction set and chosen at run time.
#pragma once
#include <cstdint>

namespace hicl {

// What counts rows beside values of a type in vectors.
template <typename T>
struct RowIndexOf;
template <>
struct RowIndexOf<float> {
  using type = int32_t;
};
template <>
struct RowIndexOf<double> {
  using type = int64_t;
};
template <typename T>
using RowIndex = typename RowIndexOf<T>::type;

template <typename T>
struct RowKernels {
  // Σ a_d b_d
  T (*dot)(const T* a, const T* b, int64_t d);
  // out_t = Σ_d x_d y_td, of `count` rows y_t
  void (*dots)(const T* x, const T* const* y, int64_t count, T* out, int64_t d);
  // out_d = x_d · factor
  void (*scale)(const T* x, T factor, T* out, int64_t d);
  // y_d += factor · x_d
  void (*add_scaled)(const T* x, T factor, T* y, int64_t d);
  // y_d += Σ_t factor_t · x_t,from+d, of `count` rows x_t
  void (*add_rows)(T* y, const T* const* x, const T* factor, int64_t count, int64_t from, int64_t d);
  // out_d = a · x_d + b · y_d
  void (*sum_of_two)(T* out, T a, const T* x, T b, const T* y, int64_t d);
  // gradient_d = g · gradient_d + a · x_d + b · y_d
  void (*combine)(T* gradient, T g, T a, const T* x, T b, const T* y, int64_t d);
  // row_j *= column_scale_j · factor; returns the largest
  T (*to_logits)(T* row, const T* column_scale, T factor, int64_t n);
  // The same, but −∞ where row_j · column_scale_j is above the limit
  T (*to_logits_below)(T* row, const T* column_scale, T factor, T limit, int64_t n);
  // row_j = e^(row_j − offset) · column_scale_j; returns Σ_j e^(row_j − offset)
  T (*exp_in_place)(T* row, const T* column_scale, T offset, int64_t n);
  // The same, and Σ_j e^(row_j − offset) · (row_j − offset), without which no temperature gradient
  T (*exp_in_place_with_moment)(T* row, const T* column_scale, T offset, int64_t n, T* moment);
  // Σ_j e^(row_j − offset), the row left as it is
  T (*exp_sum)(const T* row, T offset, int64_t n);
  // row_j = e^((row_j − offset) · scale); returns their sum
  T (*exp_of_difference)(T* row, T offset, T scale, int64_t n);
  // The largest and the first place where it is; NaN counts as the largest of all
  T (*largest)(const T* row, int64_t n, int64_t* index);
  // The same down the columns of some rows: where row r's element is larger than best_j, it is best_j, and at_j = r
  void (*column_largest)(const T* rows, int64_t stride, int64_t count, T* best, RowIndex<T>* at, int64_t n);
  // Down the columns, one row at a time: best_j = max(best_j, row_j), then total_j += e^(row_j − best_j)
  void (*column_max)(const T* row, T* best, int64_t n);
  void (*column_exp_sum)(const T* row, const T* best, T* total, int64_t n);
  // row_j = (row_weight · e^(row_j − row_lse) + column_weight_j · e^(row_j − column_lse_j)) · column_scale_j · factor
  // Returns Σ_j row_j · logit_j as it is before the last two factors
  T (*symmetric_weigh)(T* row, T row_lse, T row_weight, const T* column_lse, const T* column_weight,
                       const T* column_scale, T factor, int64_t n);
};

// The widest instruction set that was compiled in and that the processor has; HICL_FAST_CPU forces a narrower one.
template <typename T>
const RowKernels<T>& row_kernels();
const char* cpu_capability();
const char* cpu_capabilities();  // those that this processor has, narrowest first

namespace plain {
extern const RowKernels<float> kFloat;
extern const RowKernels<double> kDouble;
}  // namespace plain
namespace avx2 {
extern const RowKernels<float> kFloat;
extern const RowKernels<double> kDouble;
}  // namespace avx2
namespace avx512 {
extern const RowKernels<float> kFloat;
extern const RowKernels<double> kDouble;
}  // namespace avx512

}  // namespace hicl
