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

#include "equal_products.h"
#include "matmul.h"
#include "memory.h"
#include "paradigm_weights.h"
#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

constexpr int64_t kMinBlockRows = 64, kMaxBlockRows = 1024;
constexpr int64_t kBlockBytes = 128 << 20;  // of similarities

// Blocks of similarities (R, N), with −inf on the diagonal.
template <typename T>
class Blocks {
 public:
  Blocks(Matrix<const T> x, Matrix<const T> y)
      : x_(x),
        n_(y.rows),
        d_(y.columns),
        width_(rounded_up(n_, kColumnMultiple<T>)),
        stride_((width_ * int64_t(sizeof(T)) / 64 | 1) * 64 / int64_t(sizeof(T))),
        block_(std::min(rounded_up(n_, kRowMultiple),
                        std::clamp(kBlockBytes / (stride_ * int64_t(sizeof(T))), kMinBlockRows, kMaxBlockRows))),
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
    Workspace workspace(Workspace::bytes_of<T>(block_ * stride_));
    similarities_ = workspace.take<T>(block_ * stride_);
    for (int64_t first = 0; first < n_; first += block_) {
      const int64_t count = std::min(block_, n_ - first);
      multiply(first, count);
      for (int64_t r = 0; r < count; ++r) row(r)[first + r] = -std::numeric_limits<T>::infinity();
      f(first, count);
    }
  }
  template <typename F>
  void each_row(int64_t count, F f) {
    torch::stable::parallel_for(0, count, rows_per_thread(n_), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, row(r));
    });
  }

  T* row(int64_t r) { return similarities_ + r * stride_; }
  Matrix<T> block(int64_t count) { return {similarities_, count, n_, stride_}; }
  int64_t stride() const { return stride_; }

 private:
  void multiply(int64_t first, int64_t count) {
    const int64_t rows = rounded_up(count, kRowMultiple);
    const T* x = x_.row(first);
    if (rows > count) {
      padded_rows_.assign(rows * d_, T(0));
      std::copy(x, x + count * d_, padded_rows_.begin());
      x = padded_rows_.data();
    }
    matmul(Matrix<T>{similarities_, rows, width_, stride_}, Matrix<const T>{x, rows, d_, d_},
           Matrix<const T>{columns_, width_, d_, d_}.transposed());
  }

  Matrix<const T> x_;
  int64_t n_, d_, width_, stride_, block_;
  const T* columns_;
  std::vector<T> padded_columns_, padded_rows_;
  T* similarities_ = nullptr;
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
Statistics run_statistics(const Tensor& x, const Tensor& y, std::optional<double> temperature, bool columns) {
  const int64_t n = x.size(0);
  Tensor hardest = new_tensor<T>({n}), lse = new_tensor<T>({temperature ? n : 0}),
         column_hardest = new_tensor<T>({columns ? n : 0});
  Tensor index = new_tensor<int64_t>({n}), column_index = new_tensor<int64_t>({columns ? n : 0});
  T *best = data<T>(hardest), *log_sum = data<T>(lse);
  int64_t* at = data<int64_t>(index);
  ColumnMaxima<T> down(data<T>(column_hardest), data<int64_t>(column_index), columns ? n : 0);
  const RowKernels<T>& k = row_kernels<T>();

  Blocks<T> blocks(matrix<T>(x), matrix<T>(y));
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
Combination run_combination(const Tensor& x, const Tensor& y, const Tensor& t, const Weight& weight) {
  const int64_t n = x.size(0), d = t.size(1);
  Tensor rows = new_tensor<T>({n, d}), log_total = new_tensor<T>({n}), hardest = new_tensor<T>({n}), index = new_tensor<int64_t>({n});
  T *out = data<T>(rows), *log_sum = data<T>(log_total), *best = data<T>(hardest);
  int64_t* at = data<int64_t>(index);
  const RowKernels<T>& k = row_kernels<T>();
  std::vector<T> factor(n);

  Blocks<T> blocks(matrix<T>(x), matrix<T>(y));
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
Combination with_weight(const Tensor& x, const Tensor& y, const Tensor& t, const std::string& weight, double parameter) {
  if (weight == "softmax") return run_combination<T>(x, y, t, SoftmaxWeight<T>(parameter));
  if (weight == "power") return run_combination<T>(x, y, t, PowerWeight<T>(parameter));
  STD_TORCH_CHECK(false, "weight: expected softmax or power, got ", weight);
}

Statistics statistics(const Tensor& x, const Tensor& y, std::optional<double> temperature, bool columns) {
  return (x.scalar_type() == ScalarType::Double ? run_statistics<double> : run_statistics<float>)(x, y, temperature, columns);
}
Combination combine(const Tensor& x, const Tensor& y, const Tensor& t, std::string weight, double parameter) {
  return (x.scalar_type() == ScalarType::Double ? with_weight<double> : with_weight<float>)(x, y, t, weight, parameter);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "paradigm_statistics(Tensor x, Tensor y, float? temperature, bool columns) -> "
      "(Tensor hardest, Tensor index, Tensor lse, Tensor column_hardest, Tensor column_index)");
  m.def(
      "paradigm_combine(Tensor x, Tensor y, Tensor t, str weight, float parameter) -> "
      "(Tensor rows, Tensor log_total, Tensor hardest, Tensor index)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) {
  m.impl("paradigm_statistics", TORCH_BOX(&statistics));
  m.impl("paradigm_combine", TORCH_BOX(&combine));
}

}  // namespace hicl
