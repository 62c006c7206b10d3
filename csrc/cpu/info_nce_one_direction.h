// The loss of queries among keys: each row goes from raw similarities to logits, softmax and ∂loss/∂s, in cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "info_nce_block.h"
#include "info_nce_mask.h"
#include "logarithms.h"

namespace hicl {

// Sums over a row's exponentials e^(ℓ − best).
template <typename T>
struct RowSums {
  T best;                // the largest logit, the positive's among them
  double similar = 0;    // over the columns that are similarities and were not set aside, and the mixtures
  double beyond = 0;     // over the extra logits
  double own = 0;        // of the row's own negative
  double moment = 0;     // Σ e^(ℓ − best) · (ℓ − best) over the first, where the scale's gradient is wanted
  double negative_lse() const { return double(best) + std::log(similar + beyond + own); }
};

template <typename T>
using MixingRow = typename BlockMixing<T>::Row;

// Copies the extra logits and the set-aside positives' into the row, and takes the largest of all.
template <typename T>
T fill_in(const Prepared<T>& p, int64_t i, T* row, const Positive& positive, const SetAside<T>& aside, T best, MixingRow<T>* mixing) {
  const int64_t num_extra = p.problem.num_extra;
  T *extra = row + p.num_similarities, *mixed = extra + num_extra;
  best = std::max({best, T(positive.logit), aside.own_logit});
  if (mixing) best = std::max(best, mixing->mix(i, p.unit_query.factor(i), T(p.problem.scale), row, mixed));
  for (const auto& [column, logit] : aside.positives) row[column] = logit, best = std::max(best, logit);
  for (int64_t e = 0; e < num_extra; ++e) {
    extra[e] = p.problem.extra_logits[i * num_extra + e];
    best = std::max(best, extra[e]);
  }
  return best;
}

// In place of the row's logits e^(ℓ − best) · ‖k‖⁻¹, and their sums.
template <typename T>
RowSums<T> exponentiate(const Prepared<T>& p, T* row, const SetAside<T>& aside, T best, bool wants_moment) {
  const RowKernels<T>& k = row_kernels<T>();
  const T* factors = p.column_factor.data();
  const int64_t num_extra = p.problem.num_extra, num_mixed = p.num_columns - p.num_similarities - num_extra;
  RowSums<T> sums{best};
  const auto exponentials = [&](int64_t first, int64_t count) {
    if (!wants_moment) return k.exp_in_place(row + first, factors + first, best, count);
    T part = 0;
    const T total = k.exp_in_place_with_moment(row + first, factors + first, best, count, &part);
    sums.moment += double(part);
    return total;
  };
  sums.similar = exponentials(0, p.num_similarities);
  if (num_mixed) sums.similar += exponentials(p.num_similarities + num_extra, num_mixed);
  if (num_extra)
    sums.beyond = double(k.exp_in_place(row + p.num_similarities, factors + p.num_similarities, best, num_extra));
  sums.own = std::exp(double(aside.own_logit) - double(best));
  return sums;
}

// One row: its statistics and, where gradients are wanted, ∂loss/∂(k_j · q̂) in its place.
template <typename T>
void one_row(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out, bool wants_any, std::vector<double>& moment,
             int64_t i, MixingRow<T>* mixing) {
  const int64_t r = i - block.first, num_extra = p.problem.num_extra;
  const double scale = p.problem.scale;
  T* row = block.logits.row(r);
  T *extra = row + p.num_similarities, *mixed = extra + num_extra;
  const Positive positive = find_positive(p, block, i);
  const SetAside<T> aside = set_aside(p, i, row, positive);
  const T hardest = mask_and_scale(p, i, row);
  out.positive[i] = T(positive.similarity);
  out.hardest[i] = std::max(T(hardest / T(scale)), aside.own_similarity);

  const T best = fill_in(p, i, row, positive, aside, hardest, mixing);
  const RowSums<T> sums = exponentiate(p, row, aside, best, out.scale_gradient != nullptr);
  const double negative_lse = sums.negative_lse();
  out.negative_lse[i] = T(negative_lse);
  out.loss[i] = T(log1p_exp(negative_lse - positive.logit) + aside.shift(positive));
  if (!wants_any) return;

  // `factor` times what the row holds is weight · probability · ‖k‖⁻¹.
  const double lse = logaddexp(negative_lse, positive.logit), weight = p.problem.weight(i);
  const double share = 1.0 / aside.num_positives(), to_probability = std::exp(double(best) - lse);
  const double factor = weight * to_probability;
  block.row_factor[r] = T(factor * scale);
  block.positive_entry[r] = ((1 - share) - std::exp(negative_lse - lse)) * positive.derivative / to_probability;
  if (out.scale_gradient) {  // Σ_j weight_j (ℓ_j − ℓ_positive), which doesn't cancel where the loss is small
    const double of_own = sums.own > 0 ? sums.own * (double(aside.own_logit) - aside.own_bias - positive.logit) : 0;
    const double to_best = double(best) - positive.logit;
    moment[i] = factor * (sums.moment + to_best * sums.similar + of_own - positive.logit * sums.beyond) +
                weight * aside.shift(positive);
  }
  const T* factors = p.column_factor.data();
  if (aside.own_column >= 0) row[aside.own_column] = T(sums.own) * factors[aside.own_column];
  for (const auto& [column, logit] : aside.positives) row[column] -= T(share / to_probability) * factors[column];
  if (mixing) mixing->differentiate(i, r, p.unit_query.factor(i), block.row_factor[r], mixed, row);
  if (out.extra_gradient)
    for (int64_t e = 0; e < num_extra; ++e) out.extra_gradient[i * num_extra + e] = T(factor * extra[e]);
}

// One sweep, 6 N C D operations: a block's losses and its part of the gradients while its logits are there.
template <typename T>
void one_direction(const Prepared<T>& p, const RowBlocks& blocks, LogitBlock<T>& block, const Results<T>& out,
                   std::vector<double>& moment) {
  const bool wants_any = wants_gradients(p.problem, out);
  blocks.each([&](int64_t first, int64_t count) {
    take_similarities(p, block, first, count);
    each_range(p, block, [&](int64_t begin, int64_t end) {
      std::optional<MixingRow<T>> mixing;
      if (block.mixing) mixing.emplace(*block.mixing);
      for (int64_t r = begin; r < end; ++r) one_row(p, block, out, wants_any, moment, first + r, mixing ? &*mixing : nullptr);
    });
    if (wants_any) add_to_gradients(p, block, out);
  });
}

}  // namespace hicl
