// The two passes of the gradient paradigm over blocks of similarities s_ij = x_i·y_j of unit rows, the diagonal left out.
//
// Statistics: a row's largest similarity, its first place, log-sum-exp; the same down the columns. One product.
// Combination: Σ_j W_ij t_j with a row's weights normalised. Two products; weights in cache in between.
// What an objective makes of them is O(N D) and lies in hicl_fast/ops/paradigm_objectives.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "equal_products.h"
#include "matmul.h"
#include "memory.h"
#include "paradigm_weights.h"
#include "row_blocks.h"
#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

// Blocks of similarities (R, N), with −inf on the diagonal.
template <typename T>
class Blocks {
 public:
  Blocks(Matrix<const T> x, Matrix<const T> y, int64_t block_bytes)
      : x_(x),
        n_(y.rows),
        d_(y.columns),
        width_(rounded_up(n_, kColumnMultiple<T>)),
        stride_(row_stride_for<T>(width_)),
        blocks_(n_, stride_ * int64_t(sizeof(T)), block_bytes, kMostBlockRows),
        columns_(y.data) {
    if (width_ > n_) {  // filled up with zero rows
      padded_columns_.assign(width_ * d_, T(0));
      std::copy(y.data, y.data + n_ * d_, padded_columns_.begin());
      columns_ = padded_columns_.data();
    }
  }

  // Calls f(first, count) for each block, whose similarities are then in `row`.
  template <typename F>
  void each(F f) {
    Workspace workspace(BlockRows<T>::bytes(blocks_, stride_) + BlockRows<T>::bytes(blocks_, d_));
    similarities_ = BlockRows<T>(blocks_, stride_, workspace);
    BlockRows<T> last_rows(blocks_, d_, workspace);
    blocks_.each([&](int64_t first, int64_t count) {
      multiply(first, count, last_rows);
      for (int64_t r = 0; r < count; ++r) row(r)[first + r] = -std::numeric_limits<T>::infinity();
      f(first, count);
    });
  }
  template <typename F>
  void each_row(int64_t count, F f) {
    torch::stable::parallel_for(0, count, rows_per_thread(n_), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, row(r));
    });
  }

  T* row(int64_t r) { return similarities_.row(r); }
  Matrix<T> block(int64_t count) { return similarities_.part(count, 0, n_); }
  int64_t stride() const { return stride_; }

 private:
  void multiply(int64_t first, int64_t count, const BlockRows<T>& last_rows) {
    Matrix<const T> rows{x_.row(first), count, d_, d_};
    if (count % kRowMultiple) {
      std::copy(rows.data, rows.row(count), last_rows.row(0));
      const Matrix<T> filled_up = last_rows.filled_up(count);
      rows.data = filled_up.data, rows.rows = filled_up.rows;
    }
    matmul(similarities_.part(rows.rows, 0, width_), rows, Matrix<const T>{columns_, width_, d_, d_}.transposed());
  }

  Matrix<const T> x_;
  int64_t n_, d_, width_, stride_;
  RowBlocks blocks_;
  const T* columns_;
  std::vector<T> padded_columns_;
  BlockRows<T> similarities_;  // in the workspace of `each`
};

// The largest down each column so far, and the first row where it is. Threads share out the columns.
template <typename T>
class ColumnMaxima {
 public:
  ColumnMaxima(T* best, int64_t* index, int64_t n) : best_(best), index_(index), n_(n) {
    std::fill(best, best + n, -std::numeric_limits<T>::infinity());
    std::fill(index, index + n, 0);
  }

  void offer(Blocks<T>& blocks, int64_t first, int64_t count) {
    constexpr int64_t kSlice = 256;
    const int64_t slices = (n_ + kSlice - 1) / kSlice;
    torch::stable::parallel_for(0, slices, std::max<int64_t>(1, kGrain / (kSlice * count)), [&](int64_t s0, int64_t s1) {
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t j = s * kSlice, width = std::min(kSlice, n_ - j);
        RowIndex<T> at[kSlice];
        std::fill(at, at + width, -1);
        k_.column_largest(blocks.row(0) + j, blocks.stride(), count, best_ + j, at, width);
        for (int64_t c = 0; c < width; ++c)
          if (at[c] >= 0) index_[j + c] = first + at[c];
      }
    });
  }

 private:
  const RowKernels<T>& k_ = row_kernels<T>();
  T* best_;
  int64_t* index_;
  int64_t n_;
};

template <typename T>
Matrix<const T> matrix(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.size(0), t.size(1), t.size(1)};
}
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Statistics run_statistics(const Tensor& x, const Tensor& y, std::optional<double> temperature, bool columns,
                          int64_t block_bytes) {
  const int64_t n = x.size(0);
  Tensor hardest = new_tensor<T>({n}), lse = new_tensor<T>({temperature ? n : 0}),
         column_hardest = new_tensor<T>({columns ? n : 0});
  Tensor index = new_tensor<int64_t>({n}), column_index = new_tensor<int64_t>({columns ? n : 0});
  T *best = data<T>(hardest), *log_sum = data<T>(lse);
  int64_t* at = data<int64_t>(index);
  ColumnMaxima<T> down(data<T>(column_hardest), data<int64_t>(column_index), columns ? n : 0);
  const RowKernels<T>& k = row_kernels<T>();

  Blocks<T> blocks(matrix<T>(x), matrix<T>(y), block_bytes);
  blocks.each([&](int64_t first, int64_t count) {
    if (columns) down.offer(blocks, first, count);
    blocks.each_row(count, [&](int64_t r, T* row) {
      best[first + r] = k.largest(row, n, at + first + r);
      if (!temperature) return;
      double log_factor;
      const T total = SoftmaxWeight<T>(*temperature)(row, best[first + r], n, &log_factor);
      log_sum[first + r] = T(log_factor + std::log(double(total)));
    });
  });
  return {hardest, index, lse, column_hardest, column_index};
}

using Combination = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T, typename Weight>
Combination run_combination(const Tensor& x, const Tensor& y, const Tensor& t, const Weight& weight, int64_t block_bytes) {
  const int64_t n = x.size(0), d = t.size(1);
  Tensor rows = new_tensor<T>({n, d}), log_total = new_tensor<T>({n}), hardest = new_tensor<T>({n}), index = new_tensor<int64_t>({n});
  T *out = data<T>(rows), *log_sum = data<T>(log_total), *best = data<T>(hardest);
  int64_t* at = data<int64_t>(index);
  const RowKernels<T>& k = row_kernels<T>();
  std::vector<T> factor(n);

  Blocks<T> blocks(matrix<T>(x), matrix<T>(y), block_bytes);
  blocks.each([&](int64_t first, int64_t count) {
    blocks.each_row(count, [&](int64_t r, T* row) {
      const int64_t i = first + r;
      best[i] = k.largest(row, n, at + i);
      double log_factor;
      const T total = weight(row, best[i], n, &log_factor);
      log_sum[i] = T(log_factor + std::log(double(total)));
      factor[i] = 1 / total;
    });
    matmul(Matrix<T>{out + first * d, count, d, d}, blocks.block(count), matrix<T>(t));
    torch::stable::parallel_for(0, count, rows_per_thread(d), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = out + (first + r) * d;
        k.scale(row, factor[first + r], row, d);
      }
    });
  });
  return {rows, log_total, hardest, index};
}

template <typename T>
Combination with_weight(const Tensor& x, const Tensor& y, const Tensor& t, const std::string& weight, double parameter,
                        int64_t block_bytes) {
  if (weight == "softmax") return run_combination<T>(x, y, t, SoftmaxWeight<T>(parameter), block_bytes);
  if (weight == "power") return run_combination<T>(x, y, t, PowerWeight<T>(parameter), block_bytes);
  STD_TORCH_CHECK(false, "weight: expected softmax or power, got ", weight);
}

TensorChecks check_rows(const char* op, const Tensor& x, const Tensor& y) {
  const TensorChecks check(op, x);
  const ScalarType type = sum_type(check, "x", x);
  const int64_t n = x.size(0), d = x.size(1);
  check("x", x, type, {n, d});
  check.that(n > 0 && d > 0, "x", "expected at least one row and one dimension, got ", n, " and ", d);
  check("y", y, type, {n, d});
  return check;
}

Statistics statistics(const Tensor& x, const Tensor& y, std::optional<double> temperature, bool columns,
                      int64_t block_bytes) {
  check_rows("paradigm_statistics", x, y);
  const auto run = x.scalar_type() == ScalarType::Double ? run_statistics<double> : run_statistics<float>;
  return run(x, y, temperature, columns, block_bytes);
}
Combination combine(const Tensor& x, const Tensor& y, const Tensor& t, std::string weight, double parameter,
                    int64_t block_bytes) {
  check_rows("paradigm_combine", x, y)("t", t, x.scalar_type(), {x.size(0), kAny});
  const auto run = x.scalar_type() == ScalarType::Double ? with_weight<double> : with_weight<float>;
  return run(x, y, t, weight, parameter, block_bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "paradigm_statistics(Tensor x, Tensor y, float? temperature, bool columns, int block_bytes=134217728) -> "
      "(Tensor hardest, Tensor index, Tensor lse, Tensor column_hardest, Tensor column_index)");
  m.def(
      "paradigm_combine(Tensor x, Tensor y, Tensor t, str weight, float parameter, int block_bytes=134217728) -> "
      "(Tensor rows, Tensor log_total, Tensor hardest, Tensor index)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) {
  m.impl("paradigm_statistics", TORCH_BOX(&statistics));
  m.impl("paradigm_combine", TORCH_BOX(&combine));
}

}  // namespace hicl
