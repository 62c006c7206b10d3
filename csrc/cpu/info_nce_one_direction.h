// The loss of queries among keys: each row goes from raw similarities to logits, softmax and ∂loss/∂s, in cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "info_nce_block.h"
#include "info_nce_row.h"
#include "logarithms.h"
#include "row_blocks.h"

namespace hicl {

// A row's exponentials, and what they come to.
template <typename T>
struct RowSoftmax {
  Positive positive;
  SetAside<T> aside;
  RowSums<T> sums;
};

// From raw similarities to exponentials in their place, and the row's loss.
template <typename T>
RowSoftmax<T> row_loss(const Prepared<T>& p, const LogitBlock<T>& block, const Results<T>& out, int64_t i, MixingRow<T>* mixing) {
  T* row = block.logits.row(i - block.first);
  const Positive positive = find_positive(p, block, i);
  SetAside<T> aside = set_aside(p, i, row, positive);
  const T hardest = mask_and_scale(p, i, row);
  out.positive[i] = T(positive.similarity);
  out.hardest[i] = std::max(T(hardest / T(p.problem.scale)), aside.own_similarity);

  const T best = fill_in(p, i, row, positive, aside, hardest, mixing);
  const RowSums<T> sums = exponentiate(p, row, aside, best, out.scale_gradient != nullptr);
  out.negative_lse[i] = T(sums.negative_lse);
  out.loss[i] = T(log1p_exp(sums.negative_lse - positive.logit) + aside.shift(positive));
  return {positive, std::move(aside), sums};
}

// From exponentials to ∂loss/∂(k_j · q̂) in their place, but for the block's row factor.
template <typename T>
void row_gradient(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out, std::vector<double>& moment, int64_t i,
                  const RowSoftmax<T>& softmax, MixingRow<T>* mixing) {
  const auto& [positive, aside, sums] = softmax;
  const int64_t r = i - block.first, num_extra = p.problem.num_extra;
  T* row = block.logits.row(r);
  T *extra = row + p.num_similarities, *mixed = extra + num_extra;
  // `factor` times what the row holds is weight · probability · ‖k‖⁻¹.
  const double lse = logaddexp(sums.negative_lse, positive.logit), weight = p.problem.weight(i);
  const double share = 1.0 / aside.num_positives(), to_probability = std::exp(double(sums.best) - lse);
  const double factor = weight * to_probability;
  block.row_factor[r] = T(factor * p.problem.scale);
  block.positive_entry[r] = ((1 - share) - std::exp(sums.negative_lse - lse)) * positive.derivative / to_probability;
  if (out.scale_gradient) moment[i] = factor * sums.scale_moment(aside, positive.logit) + weight * aside.shift(positive);
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
      MixingRow<T>* mixing_row = mixing ? &*mixing : nullptr;
      for (int64_t i = first + begin; i < first + end; ++i) {
        const RowSoftmax<T> softmax = row_loss(p, block, out, i, mixing_row);
        if (wants_any) row_gradient(p, block, out, moment, i, softmax, mixing_row);
      }
    });
    if (wants_any) add_to_gradients(p, block, out);
  });
}

}  // namespace hicl
