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
  const T limit = limit_of_row(p, i, positive);
  SetAside<T> aside = set_aside(p, i, row, positive, limit);
  const Largest<T> largest = mask_and_scale(p, i, row, limit);
  out.positive[i] = T(positive.similarity);
  out.hardest[i] = std::max(largest.similarity, aside.own_similarity);

  const T best = fill_in(p, i, row, positive, aside, largest.logit, mixing);
  const RowSums<T> sums = exponentiate(p, row, aside, best, out.scale_gradient != nullptr);
  out.negative_lse[i] = T(sums.negative_lse);
  out.loss[i] = T(log1p_exp(sums.negative_lse - positive.logit) + aside.shift(positive));
  return {positive, std::move(aside), sums};
}

// From exponentials to ∂/∂(k_j · q̂) in their place, but for the block's row factor.
//
// The row factor is what makes a derivative of a negative's exponential, so that no pass over the row does. Where it is that
// much smaller than the positive's derivative that their quotient could leave the type's range, the row is multiplied after all.
template <typename T>
void row_gradient(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out, std::vector<double>& moment, int64_t i,
                  const RowSoftmax<T>& softmax, MixingRow<T>* mixing) {
  constexpr double kMostQuotient = 1e15;
  const auto& [positive, aside, sums] = softmax;
  const int64_t r = i - block.first, num_extra = p.problem.num_extra;
  T* row = block.logits.row(r);
  T *extra = row + p.num_similarities, *mixed = extra + num_extra;
  const T* factors = p.column_factor.data();

  const RowWeights weights = weights_of_row(p, i, positive, aside, sums.negative_lse);
  const double of_negatives = weights.negative == 0 ? 0.0 : weights.negative * std::exp(double(sums.best) - sums.negative_lse);
  const double share = 1.0 / aside.num_positives(), of_positive = weights.positive + weights.shift * (1 - share);
  if (out.scale_gradient)
    moment[i] = of_negatives * sums.scale_moment(aside, positive.logit) +
                (weights.negative + weights.positive) * positive.logit + weights.shift * aside.shift(positive);
  if (aside.own_column >= 0) row[aside.own_column] = T(sums.own) * factors[aside.own_column];
  double factor = of_negatives;
  if (const double most = std::max(std::abs(of_positive), std::abs(weights.shift)); most > kMostQuotient * std::abs(factor)) {
    factor = most;
    row_kernels<T>().scale(row, T(of_negatives / most), row, p.num_columns);
  }
  block.row_factor[r] = T(factor * p.problem.scale);
  block.positive_entry[r] = factor == 0 && of_positive == 0 ? 0.0 : of_positive * positive.derivative / factor;
  for (const auto& [column, logit] : aside.positives) row[column] -= T(weights.shift * share / factor) * factors[column];
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
