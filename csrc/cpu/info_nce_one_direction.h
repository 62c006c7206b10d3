// A row of the loss in one direction: from raw similarities to softmax to ∂loss/∂similarity, in cache.
#pragma once
#include <cmath>

#include "info_nce_sweep.h"

namespace hicl {

constexpr double kAngleClamp = 1e-7;

// The positive's dot product is taken once more by itself, so that it is exact whatever the products' precision.
template <typename T>
Positive Sweep<T>::find_positive(int64_t i) const {
  const UnitRows<T>& keys = segments_[0].unit;
  const int64_t column = target(i);
  const T* unit_query = unit_block_.row(i - block_first_);
  const double s = double(k_.dot(unit_query, keys.row(column), query_.columns)) * double(keys.factor(column));
  if (rules_.margin == 0) return {column, s, s * rules_.scale, 1.0};
  // The bounds are the type's nearest, as in a comparison in that type.
  const double low = T(-1 + kAngleClamp), high = T(1 - kAngleClamp);
  const double theta = std::acos(s < low ? low : s > high ? high : s);
  const bool clamped = s < low || s > high;
  return {column, s, std::cos(theta + rules_.margin) * rules_.scale,
          clamped ? 0.0 : std::sin(theta + rules_.margin) / std::sin(theta)};
}

// From raw similarities to logits with −inf where a column doesn't compete with the positive.
// Returns the largest of them over all columns but the own negative and the extra ones.
template <typename T>
T Sweep<T>::mask_and_scale(int64_t i, T* row, const Positive& positive) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  row[positive.column] = kNothing;
  if (query_group_ && rules_.same_group == SameGroup::kExclude)
    for (const int64_t j : groups_.of(query_group_[i])) row[j] = kNothing;
  return k_.to_logits(row, logit_factor_.data(), T(rules_.scale), num_similarities_);
}

template <typename T>
typename Sweep<T>::Apart Sweep<T>::take_apart(int64_t i, T* row, const Positive& positive) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  Apart apart;
  if (first_own_ >= 0) {
    const int64_t j = first_own_ + i;
    apart.own_similarity = row[j] * column_factor_[j];
    apart.own_logit = T(apart.own_similarity * rules_.scale + rules_.hard_negative_weight);
    row[j] = kNothing;
  }
  if (query_group_ && rules_.same_group == SameGroup::kPositive)
    for (const int64_t j : groups_.of(query_group_[i]))
      if (j != positive.column) {
        apart.positives.emplace_back(j, T(row[j] * column_factor_[j] * rules_.scale));
        row[j] = kNothing;
      }
  return apart;
}

// One row of the loss in one direction: statistics, and ∂loss/∂(k_j · q̂) in place of the row where wanted.
template <typename T>
void Sweep<T>::one_direction(int64_t i, int64_t r, T* row, MixingRow* mixing) {
  const Positive positive = find_positive(i);
  const Apart apart = take_apart(i, row, positive);
  T best = mask_and_scale(i, row, positive);
  out_.positive[i] = T(positive.similarity);
  out_.hardest[i] = std::max(T(best / T(rules_.scale)), apart.own_similarity);

  best = std::max({best, T(positive.logit), apart.own_logit});
  T *extra = row + num_similarities_, *mixed = extra + num_extra_;
  const T query_factor = unit_query_.factor(i);
  if (mixing) best = std::max(best, mixing->mix(i, query_factor, T(rules_.scale), row, mixed));
  for (const auto& [column, logit] : apart.positives) row[column] = logit, best = std::max(best, logit);
  for (int64_t e = 0; e < num_extra_; ++e) {
    extra[e] = extra_[i * num_extra_ + e];
    best = std::max(best, extra[e]);
  }

  double moment = 0;
  const T* factors = column_factor_.data();
  const auto exponentials = [&](T* from, int64_t count) {
    if (!wanted_.scale) return k_.exp_in_place(from, factors + (from - row), best, count);
    T part = 0;
    const T total = k_.exp_in_place_with_moment(from, factors + (from - row), best, count, &part);
    moment += double(part);
    return total;
  };
  double similar = exponentials(row, num_similarities_);
  if (mixing) similar += exponentials(mixed, num_columns_ - num_similarities_ - num_extra_);
  const double beyond = num_extra_ ? double(k_.exp_in_place(extra, factors + num_similarities_, best, num_extra_)) : 0.0;
  const double own = std::exp(double(apart.own_logit) - double(best));
  const double negative_lse = double(best) + std::log(similar + beyond + own);
  out_.negative_lse[i] = T(negative_lse);
  out_.loss[i] = T(log1p_exp(negative_lse - positive.logit) + apart.shift(positive));
  if (!wanted_.any()) return;

  // The row now holds e^(ℓ − best) · ‖k‖⁻¹; `factor` times that is weight · probability · ‖k‖⁻¹.
  const double lse = logaddexp(negative_lse, positive.logit), weight = row_weight(i);
  const double share = 1.0 / double(1 + apart.positives.size()), to_probability = std::exp(double(best) - lse);
  const double factor = weight * to_probability;
  row_factor_[r] = T(factor * rules_.scale);
  positive_entry_[r] = ((1 - share) - std::exp(negative_lse - lse)) * positive.slope / to_probability;
  if (wanted_.scale) {  // Σ_j weight_j (ℓ_j − ℓ_positive), which doesn't cancel where the loss is small
    const double own_term = own > 0 ? own * (double(apart.own_logit) - rules_.hard_negative_weight - positive.logit) : 0;
    const double to_best = double(best) - positive.logit;
    moment_[i] = factor * (moment + to_best * similar + own_term - positive.logit * beyond) +
                 weight * apart.shift(positive);
  }
  if (first_own_ >= 0) row[first_own_ + i] = T(own) * factors[first_own_ + i];
  for (const auto& [column, logit] : apart.positives) row[column] -= T(share / to_probability) * factors[column];
  if (mixing) mixing->differentiate(i, r, query_factor, row_factor_[r], mixed, row);
  if (out_.extra_gradient)
    for (int64_t e = 0; e < num_extra_; ++e) out_.extra_gradient[i * num_extra_ + e] = T(factor * extra[e]);
}

}  // namespace hicl
