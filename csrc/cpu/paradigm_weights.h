// What each weight of the gradient paradigm is of a row's similarities, up to a factor. A new one is a class here, and a
// line in `with_weight` (paradigm.cpp).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../constants.h"
#include "rows.h"

namespace hicl {

// e^(s/τ), divided by the largest
template <typename T>
class SoftmaxWeight {
 public:
  explicit SoftmaxWeight(double temperature) : scale_(1 / temperature) {}

  // row_j = the weight of s_j; returns their sum. −inf has none. `log_factor` is the logarithm of what was divided by.
  T operator()(T* row, T hardest, int64_t n, double* log_factor) const {
    *log_factor = double(hardest) * scale_;
    return k_.exp_of_difference(row, hardest, T(scale_), n);
  }

 private:
  const RowKernels<T>& k_ = row_kernels<T>();
  double scale_;
};

// max(s, kPowerFloor)^p, divided by the largest: the floor's twelfth power is 0 in float32
template <typename T>
class PowerWeight {
 public:
  explicit PowerWeight(double exponent) : exponent_(exponent) {}

  T operator()(T* row, T hardest, int64_t n, double* log_factor) const {
    constexpr T kFloor = T(kPowerFloor);
    const T base = hardest < kFloor || exponent_ < 0 ? kFloor : hardest;
    *log_factor = exponent_ * std::log(double(base));
    const bool is_small = exponent_ == std::floor(exponent_) && exponent_ >= 1 && exponent_ <= 16;
    double total = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (std::isinf(row[j])) {  // the diagonal
        row[j] = 0;
        continue;
      }
      const T s = (row[j] < kFloor ? kFloor : row[j]) / base;
      row[j] = is_small ? repeated(s, int(exponent_)) : std::pow(s, T(exponent_));
      total += double(row[j]);
    }
    return T(total);
  }

 private:
  static T repeated(T s, int times) {
    T product = s;
    for (int i = 1; i < times; ++i) product *= s;
    return product;
  }
  double exponent_;
};

}  // namespace hicl
