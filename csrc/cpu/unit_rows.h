// x̂ = x / max(‖x‖, 1e-12): the factor of each row, and the way back for gradients.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../constants.h"
#include "rows.h"

namespace hicl {

constexpr int64_t kGrain = 1 << 14;  // elements a thread must have to do before another one is worth waking

inline int64_t rows_per_thread(int64_t row_length) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_length)); }

template <typename T>
constexpr T power_of_two(int exponent) {
  T power = 1;
  for (; exponent > 0; --exponent) power *= 2;
  for (; exponent < 0; ++exponent) power /= 2;
  return power;
}

// Which squared lengths are what they should be: neither they nor what they are summed from leave the type's range.
// A longer row is multiplied by `kShrink` before anything else is done with it, which changes no digit and no direction;
// then it is longer than the floor, and its products with others stay within the range.
template <typename T>
struct Squares {
  using Limits = std::numeric_limits<T>;
  static constexpr T kLeast = power_of_two<T>(Limits::min_exponent + Limits::digits);  // far below the floor's square
  static constexpr T kMost = power_of_two<T>(Limits::max_exponent - 2);
  static constexpr T kShrink = power_of_two<T>(-Limits::max_exponent / 2 - 16);
};

// ‖shrink · x‖, with the rows' own 1 as the factor of nearly all rows.
template <typename T>
struct Length {
  double norm;
  T shrink;
};

constexpr int64_t kFewDimensions = 32;

// Short rows' are exact: of one dimension x/‖x‖ is ±1, and what is left of its gradient 0.
template <typename T>
double squared_length(const T* row, int64_t d) {
  if (d >= kFewDimensions) return double(row_kernels<T>().dot(row, row, d));
  double squared = 0;
  for (int64_t i = 0; i < d; ++i) squared += double(row[i]) * double(row[i]);
  return squared;
}

template <typename T>
Length<T> length_beyond_squares(const T* row, int64_t d, double squared) {
  if (squared < Squares<T>::kLeast) {  // what counts is whether it is zero: all others are below the floor
    const bool is_zero = std::all_of(row, row + d, [](T x) { return x == 0; });
    return {is_zero ? 0.0 : std::max(std::sqrt(squared), double(std::numeric_limits<T>::min())), T(1)};
  }
  const RowKernels<T>& k = row_kernels<T>();
  std::vector<T> shorter(d);
  k.scale(row, Squares<T>::kShrink, shorter.data(), d);
  return {std::sqrt(squared_length(shorter.data(), d)), Squares<T>::kShrink};
}
template <typename T>
Length<T> length(const T* row, int64_t d) {
  const double squared = squared_length(row, d);
  if (squared >= Squares<T>::kLeast && squared < Squares<T>::kMost) return {std::sqrt(squared), T(1)};
  return length_beyond_squares(row, d, squared);
}

// A row below the floor is divided by a constant.
inline bool has_constant_norm(double norm) { return norm < kNormFloor; }
// What a row of that length is multiplied by. A zero row's similarities are 0 whatever it is; 0 makes its gradients 0 too.
// An infinite norm gives NaN, as a NaN does: 1/∞ = 0 would hide it.
template <typename T>
T unit_factor(double norm) {
  return norm == 0 ? T(0) : has_constant_norm(norm) ? T(1 / kNormFloor) : T(1 / norm + (norm - norm));
}

// The rows stay as they are: their factors go into the logits and, on the way back, into the gradients. Where some are so
// long that their products would overflow, all are copied and those made shorter.
template <typename T>
class UnitRows {
 public:
  UnitRows(const T* rows, int64_t n, int64_t d) : rows_(rows), d_(d), factor_(n), norm_(n), shrink_(n) {
    std::atomic<bool> has_long(false);
    torch::stable::parallel_for(0, n, rows_per_thread(d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Length<T> measured = length(row(i), d);
        norm_[i] = T(measured.norm), shrink_[i] = measured.shrink;
        factor_[i] = unit_factor<T>(measured.norm);
        if (measured.shrink != 1) has_long.store(true, std::memory_order_relaxed);
      }
    });
    if (has_long) shorten();
  }

  int64_t count() const { return int64_t(factor_.size()); }
  bool has_constant_norm(int64_t i) const { return hicl::has_constant_norm(norm_[i]); }
  const T* row(int64_t i) const { return rows_ + i * d_; }  // as it came, times shrink(i)
  const T* factors() const { return factor_.data(); }
  T factor(int64_t i) const { return factor_[i]; }
  T shrink(int64_t i) const { return shrink_[i]; }
  // (N,), or null where every row is as it came.
  const T* shrinks() const { return shorter_.empty() ? nullptr : shrink_.data(); }

  // From `gradient` = ∂L/∂x̂_i · factor_i to ∂L/∂x_i = factor_i (I − x̂ x̂ᵀ) ∂L/∂x̂_i, in place.
  // What the loss takes of x_i itself, not of x̂_i, stays as it is:
  // `kept` is x_i · its gradient, which `gradient` has in it.
  void project(int64_t i, T* gradient, T kept = 0) const {
    if (has_constant_norm(i)) return;
    const RowKernels<T>& k = row_kernels<T>();
    const T along = (k.dot(row(i), gradient, d_) - kept) * factor_[i] * factor_[i];
    k.add_scaled(row(i), -along, gradient, d_);
    if (shrink_[i] != 1) k.scale(gradient, shrink_[i], gradient, d_);
  }
  void project_all(T* gradients, const T* kept = nullptr) const {
    torch::stable::parallel_for(0, count(), rows_per_thread(d_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) project(i, gradients + i * d_, kept ? kept[i] : T(0));
    });
  }

 private:
  void shorten() {
    shorter_.assign(rows_, rows_ + count() * d_);
    rows_ = shorter_.data();
    for (int64_t i = 0; i < count(); ++i)
      if (shrink_[i] != 1) row_kernels<T>().scale(row(i), shrink_[i], shorter_.data() + i * d_, d_);
  }

  const T* rows_;
  int64_t d_;
  std::vector<T> factor_, norm_, shrink_;  // (N,) of the rows as they are after `shorten`
  std::vector<T> shorter_;                 // (N, D), or empty
};

}  // namespace hicl
