// x̂ = x / max(‖x‖, 1e-12): the factor of each row, and the way back for gradients.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace hicl {

constexpr double kNormFloor = 1e-12;
constexpr int64_t kGrain = 1 << 14;  // elements a thread must have to do before another one is worth waking

inline int64_t rows_per_thread(int64_t row_length) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_length)); }

// A row below the floor is divided by a constant.
template <typename T>
bool has_constant_norm(T norm) {
  return norm < T(kNormFloor);
}
// What a row of that length is multiplied by. A zero row's similarities are 0 whatever it is; 0 makes its gradients 0 too.
template <typename T>
T unit_factor(T norm) {
  return norm == 0 ? T(0) : has_constant_norm(norm) ? T(1 / kNormFloor) : 1 / norm;
}

// The rows stay as they are: their factors go into the logits and, on the way back, into the gradients.
template <typename T>
class UnitRows {
 public:
  UnitRows(const T* rows, int64_t n, int64_t d) : rows_(rows), d_(d), factor_(n), norm_(n) {
    const RowKernels<T>& k = row_kernels<T>();
    torch::stable::parallel_for(0, n, rows_per_thread(d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norm_[i] = std::sqrt(k.dot(row(i), row(i), d));
        factor_[i] = unit_factor(norm_[i]);
      }
    });
  }

  int64_t count() const { return int64_t(factor_.size()); }
  bool has_constant_norm(int64_t i) const { return hicl::has_constant_norm(norm_[i]); }
  const T* row(int64_t i) const { return rows_ + i * d_; }
  const T* factors() const { return factor_.data(); }
  T factor(int64_t i) const { return factor_[i]; }

  // From `gradient` = ∂L/∂x̂_i · factor_i to ∂L/∂x_i = factor_i (I − x̂ x̂ᵀ) ∂L/∂x̂_i, in place.
  // What the loss takes of x_i itself, not of x̂_i, stays as it is:
  // `kept` is x_i · its gradient, which `gradient` has in it.
  void project(int64_t i, T* gradient, T kept = 0) const {
    if (has_constant_norm(i)) return;
    const RowKernels<T>& k = row_kernels<T>();
    const T along = (k.dot(row(i), gradient, d_) - kept) * factor_[i] * factor_[i];
    k.add_scaled(row(i), -along, gradient, d_);
  }
  void project_all(T* gradients, const T* kept = nullptr) const {
    torch::stable::parallel_for(0, count(), rows_per_thread(d_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) project(i, gradients + i * d_, kept ? kept[i] : T(0));
    });
  }

 private:
  const T* rows_;
  int64_t d_;
  std::vector<T> factor_, norm_;
};

}  // namespace hicl
