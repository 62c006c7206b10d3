// What a call of InfoNCE asks for and where its results go; no mathematics but two logarithms.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "unit_rows.h"

namespace hicl {

enum class SameGroup : int64_t { kExclude, kNegative, kPositive };

// log(1 + eˣ) with all digits of a small result
inline double log1p_exp(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }
inline double logaddexp(double a, double b) {
  if (a == b) return a + std::log(2.0);  // also for −inf, whose difference is NaN
  return std::max(a, b) + log1p_exp(-std::abs(a - b));
}

struct Wanted {
  bool query, key, negatives, extra_logits, scale;
  explicit Wanted(int64_t bits)
      : query(bits & 1), key(bits & 2), negatives(bits & 4), extra_logits(bits & 8), scale(bits & 16) {}
  bool any() const { return query || key || negatives || extra_logits || scale; }
};

struct Rules {
  double scale;  // 1 / temperature
  double hard_negative_weight;
  SameGroup same_group;
  double margin;
  bool symmetric;
};

// The columns of one input: keys, explicit negatives or bank rows.
template <typename T>
struct Segment {
  UnitRows<T> unit;
  int64_t first;  // column
  T* gradient;    // (count, D), or null where none is wanted
};

template <typename T>
struct Outputs {
  T *loss, *negative_lse, *column_lse, *positive, *hardest;     // (N,), (N,), (M,) or empty, (N,), (N,)
  T* total;                                                     // () common weight · Σ loss
  T *query_gradient, *extra_gradient, *scale_gradient;          // null where not wanted
};

// What a row's positive comes to.
struct Positive {
  int64_t column;
  double similarity, logit, slope;  // slope: derivative of the margin-adjusted similarity
};

}  // namespace hicl
