// What a call of InfoNCE consists of and where its results go: filled once, by name, and read by all that follows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "block_mixing.h"
#include "info_nce_columns.h"
#include "matmul.h"

namespace hicl {

// What columns may be similar at most; a more similar one is left out, unless it is a positive.
template <typename T>
struct Limits {
  const T* of_rows = nullptr;  // (N,)
  double margin = std::numeric_limits<double>::infinity();  // above the positive's similarity
  double ratio = std::numeric_limits<double>::infinity();   // of the positive's similarity, where that is above 0

  bool are_any() const { return of_rows || std::min(margin, ratio) < std::numeric_limits<double>::infinity(); }
  T of_row(int64_t i, double positive) const {
    double limit = of_rows ? double(of_rows[i]) : std::numeric_limits<double>::infinity();
    limit = std::min(limit, positive + margin);
    return T(positive > 0 ? std::min(limit, positive * ratio) : limit);
  }
};

template <typename T>
struct Problem {
  Matrix<const T> query{};          // (N, D)
  std::vector<Columns<T>> columns;  // the first holds the positives
  const T* extra_logits = nullptr;  // (N, E) further columns
  int64_t num_extra = 0;
  std::optional<MixingRules> mixing;  // mixtures of each row's hardest keys are further columns, after the extra logits
  double scale = 1;                   // 1 / temperature
  double margin = 0;                  // radians
  bool symmetric = false;
  Limits<T> limits;
  double common_weight = 1;       // of every row in the loss,
  const T* row_weight = nullptr;  // (N,) times the row's own, where there are any

  // In place of the loss, a row's negative log-sum-exp and its positive's logit are differentiated, with these weights: (N,)
  // each, or null.
  const T *negative_weight = nullptr, *positive_weight = nullptr;

  double weight(int64_t i) const { return row_weight ? common_weight * double(row_weight[i]) : common_weight; }
};

// Null where a result isn't wanted; the columns' gradients are with the columns.
template <typename T>
struct Results {
  T *loss = nullptr, *positive = nullptr, *hardest = nullptr;  // (N,) each; similarities of the positive and the hardest negative
  T *negative_lse = nullptr, *column_lse = nullptr;            // (N,), (M,) without the positive; the second if symmetric
  T* total = nullptr;                                          // () common weight · Σ loss
  T* query_gradient = nullptr;                                 // (N, D)
  T* extra_gradient = nullptr;                                 // (N, E)
  T* scale_gradient = nullptr;                                 // ()
};

template <typename T>
bool wants_gradients(const Problem<T>& problem, const Results<T>& out) {
  for (const Columns<T>& columns : problem.columns)
    if (columns.gradient) return true;
  return out.query_gradient || out.extra_gradient || out.scale_gradient;
}

}  // namespace hicl
