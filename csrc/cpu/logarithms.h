// Logarithms of sums of exponentials that keep the digits of small results.
#pragma once
#include <algorithm>
#include <cmath>

namespace hicl {

// log(1 + eˣ)
inline double log1p_exp(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// log(eᵃ + eᵇ)
inline double logaddexp(double a, double b) {
  if (a == b) return a + std::log(2.0);  // also for −inf, whose difference is NaN
  return std::max(a, b) + log1p_exp(-std::abs(a - b));
}

}  // namespace hicl
