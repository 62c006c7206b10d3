// A row of the loss: its positive, its mask, and the way from raw similarities to logits to exponentials and their sums. Whatever
// a rule of a kind of column does to a row's logits, it does here.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "block_mixing.h"
#include "info_nce_block.h"
#include "info_nce_prepared.h"
#include "logarithms.h"
#include "rows.h"

namespace hicl {

template <typename T>
constexpr T kLeftOut = -std::numeric_limits<T>::infinity();

// What a row's positive comes to.
struct Positive {
  int64_t column;
  double similarity, logit;
  double derivative;  // of the similarity with the margin, by the similarity
};

// The positive's dot product is taken once more by itself, so that it is exact whatever the products' precision.
template <typename T>
Positive find_positive(const Prepared<T>& p, const LogitBlock<T>& block, int64_t i) {
  const UnitRows<T>& keys = p.keys().unit;
  const int64_t column = p.target(i);
  const T* unit_query = block.unit_query.row(i - block.first);
  const double s = double(row_kernels<T>().dot(unit_query, keys.row(column), p.query.columns)) * double(keys.factor(column));
  const double scale = p.problem.scale, margin = p.problem.margin;
  if (margin == 0) return {column, s, s * scale, 1.0};
  // The bounds are the type's nearest, as in a comparison in that type.
  const double low = T(-1 + kAngleClamp), high = T(1 - kAngleClamp);
  const double theta = std::acos(s < low ? low : s > high ? high : s);
  const bool clamped = s < low || s > high;
  return {column, s, std::cos(theta + margin) * scale, clamped ? 0.0 : std::sin(theta + margin) / std::sin(theta)};
}

// Columns of a row whose logits are not scale · similarity, or whose gradient is not their softmax alone. They are taken out
// of the row before the pass over it, which then treats all columns alike, and put back afterwards.
template <typename T>
struct SetAside {
  int64_t own_column = -1;  // the row's own negative, if it has one
  T own_similarity = kLeftOut<T>;
  T own_logit = kLeftOut<T>;  // with its bias
  double own_bias = 0;
  double own_share = 1;  // scale · similarity of what its logit is beyond the bias
  std::vector<std::pair<int64_t, T>> positives;  // the further ones: column, logit

  double num_positives() const { return double(1 + positives.size()); }
  // The positive's logit minus the mean logit of all positives.
  double shift(const Positive& target) const {
    double sum = 0;
    for (const auto& [column, logit] : positives) sum += target.logit - double(logit);
    return sum / num_positives();
  }
};

template <typename T>
void set_own_negative_aside(const Prepared<T>& p, const Kind<T>& kind, int64_t i, T* row, T limit, SetAside<T>& aside) {
  const int64_t j = kind.special_column(i);
  const T similarity = row[j] * p.column_factor[j];
  const bool is_excluded = kind.rules.groups == Groups::kExcluded && kind.rules.is_of_group(i, j - kind.first);
  row[j] = kLeftOut<T>;
  if (is_excluded || similarity > limit) return;
  const double scale = p.problem.scale;
  aside.own_column = j, aside.own_similarity = similarity, aside.own_bias = kind.rules.bias;
  aside.own_logit = T(similarity * kind.scale(scale) + kind.rules.bias);
  aside.own_share = scale / kind.scale(scale);
}

template <typename T>
SetAside<T> set_aside(const Prepared<T>& p, int64_t i, T* row, const Positive& positive, T limit) {
  const T* factor = p.column_factor.data();
  SetAside<T> aside;
  for (const Kind<T>& kind : p.kinds) {
    if (kind.rules.special == Special::kOwnNegative) set_own_negative_aside(p, kind, i, row, limit, aside);
    if (kind.rules.groups == Groups::kPositives)
      kind.each_of_group(i, [&](int64_t of_kind) {
        const int64_t j = kind.first + of_kind;
        if (j == positive.column) return;
        aside.positives.emplace_back(j, T(row[j] * factor[j] * p.problem.scale));
        row[j] = kLeftOut<T>;
      });
  }
  return aside;
}

// Of a row: what its columns may be similar at most.
template <typename T>
T limit_of_row(const Prepared<T>& p, int64_t i, const Positive& positive) {
  return p.problem.limits.are_any() ? p.problem.limits.of_row(i, positive.similarity) : -kLeftOut<T>;
}

// The largest of some columns.
template <typename T>
struct Largest {
  T logit, similarity;
};

// From raw similarities to logits, −inf where a column doesn't compete with the positive: the largest over all columns that are
// similarities but those that were set aside.
template <typename T>
Largest<T> mask_and_scale(const Prepared<T>& p, int64_t i, T* row, T limit) {
  for (const Kind<T>& kind : p.kinds) {
    if (kind.rules.special == Special::kPositive) row[kind.special_column(i)] = kLeftOut<T>;
    if (kind.rules.groups == Groups::kExcluded)
      kind.each_of_group(i, [&](int64_t j) { row[kind.first + j] = kLeftOut<T>; });
    kind.each_listed(i, [&](int64_t j) { row[kind.first + j] = kLeftOut<T>; });
  }
  const RowKernels<T>& k = row_kernels<T>();
  const auto scaled = [&](int64_t first, int64_t count, T scale) {
    const T* factors = p.logit_factor.data() + first;
    return limit == -kLeftOut<T> ? k.to_logits(row + first, factors, scale, count)
                                 : k.to_logits_below(row + first, factors, scale, limit, count);
  };
  if (!p.has_hardness) {
    const T best = scaled(0, p.num_similarities, T(p.problem.scale));
    return {best, best / T(p.problem.scale)};
  }
  Largest<T> largest{kLeftOut<T>, kLeftOut<T>};
  for (const Kind<T>& kind : p.kinds) {
    const T scale = T(kind.scale(p.problem.scale)), best = scaled(kind.first, kind.count(), scale);
    largest = {std::max(largest.logit, best), std::max(largest.similarity, best / scale)};
  }
  return largest;
}

// Sums over a row's exponentials e^(ℓ − best).
template <typename T>
struct RowSums {
  T best;                // the largest logit of the columns but the positive; the positive's where there are none
  double similar = 0;    // over the columns that are similarities and were not set aside, and the mixtures
  double beyond = 0;     // over the extra logits
  double own = 0;        // of the row's own negative
  double moment = 0;     // Σ e^(ℓ − best) · (scale · s − best) over the first, where the scale's gradient is wanted
  double negative_lse = 0;

  // Σ_j e^(ℓ_j − best) (scale · s_j − ℓ_positive), which doesn't cancel where the loss is small; extra logits have no s.
  double scale_moment(const SetAside<T>& aside, double positive_logit) const {
    const double of_own =
        own > 0 ? own * ((double(aside.own_logit) - aside.own_bias) * aside.own_share - positive_logit) : 0;
    const double to_best = double(best) - positive_logit;
    return moment + to_best * similar + of_own - positive_logit * beyond;
  }
};

template <typename T>
using MixingRow = typename BlockMixing<T>::Row;

// Copies the extra logits and the set-aside positives' into the row, and takes the largest of all but the target's.
template <typename T>
T fill_in(const Prepared<T>& p, int64_t i, T* row, const Positive& positive, const SetAside<T>& aside, T best,
          MixingRow<T>* mixing) {
  const int64_t num_extra = p.problem.num_extra;
  T *extra = row + p.num_similarities, *mixed = extra + num_extra;
  best = std::max(best, aside.own_logit);
  if (mixing) best = std::max(best, mixing->mix(i, p.unit_query.factor(i), T(p.problem.scale), row, mixed));
  for (const auto& [column, logit] : aside.positives) row[column] = logit, best = std::max(best, logit);
  for (int64_t e = 0; e < num_extra; ++e) {
    extra[e] = p.problem.extra_logits[i * num_extra + e];
    best = std::max(best, extra[e]);
  }
  return best == kLeftOut<T> ? T(positive.logit) : best;
}

// In place of the row's logits e^(ℓ − best) · ‖k‖⁻¹, and their sums.
template <typename T>
RowSums<T> exponentiate(const Prepared<T>& p, T* row, const SetAside<T>& aside, T best, bool wants_moment) {
  const RowKernels<T>& k = row_kernels<T>();
  const T* factors = p.column_factor.data();
  const int64_t num_extra = p.problem.num_extra, num_mixed = p.num_columns - p.num_similarities - num_extra;
  RowSums<T> sums{best};
  // `share` of the logits is scale · s.
  const auto add_exponentials = [&](int64_t first, int64_t count, double share) {
    if (!wants_moment) {
      sums.similar += double(k.exp_in_place(row + first, factors + first, best, count));
      return;
    }
    T part = 0;
    const double total = double(k.exp_in_place_with_moment(row + first, factors + first, best, count, &part));
    sums.similar += total;
    sums.moment += share == 1 ? double(part) : share * double(part) + (share - 1) * double(best) * total;
  };
  if (p.has_hardness) {
    for (const Kind<T>& kind : p.kinds)
      add_exponentials(kind.first, kind.count(), p.problem.scale / kind.scale(p.problem.scale));
  } else {
    add_exponentials(0, p.num_similarities, 1);
  }
  if (num_mixed) add_exponentials(p.num_similarities + num_extra, num_mixed, 1);
  if (num_extra)
    sums.beyond = double(k.exp_in_place(row + p.num_similarities, factors + p.num_similarities, best, num_extra));
  sums.own = std::exp(double(aside.own_logit) - double(best));
  sums.negative_lse = double(best) + std::log(sums.similar + sums.beyond + sums.own);
  return sums;
}

// The derivatives of what is differentiated by what a row's logits come to.
struct RowWeights {
  double negative;   // by the log-sum-exp of its columns but the positive; 0 where there are none
  double positive;   // by the positive's logit
  double shift = 0;  // by the positive's logit minus the mean logit of all positives
};

template <typename T>
RowWeights weights_of_row(const Prepared<T>& p, int64_t i, const Positive& positive, const SetAside<T>& aside,
                          double negative_lse) {
  const Problem<T>& problem = p.problem;
  if (problem.negative_weight) {
    const bool has_negative = negative_lse != double(kLeftOut<T>);
    return {has_negative ? double(problem.negative_weight[i]) : 0.0, double(problem.positive_weight[i])};
  }
  const double weight = problem.weight(i);
  const double negative = weight * std::exp(negative_lse - logaddexp(negative_lse, positive.logit));
  return {negative, -negative, aside.positives.empty() ? 0.0 : weight};
}

}  // namespace hicl
