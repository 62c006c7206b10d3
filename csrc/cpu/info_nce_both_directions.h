// The symmetric loss. It must see every row of a column before the column's softmax is known: it sweeps twice, 8 N C D
// operations, unless one block holds everything.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "info_nce_block.h"
#include "info_nce_row.h"
#include "logarithms.h"
#include "row_blocks.h"
#include "rows.h"

namespace hicl {

// What the first sweep leaves for the second.
template <typename T>
struct BothDirections {
  BothDirections(int64_t num_rows, int64_t num_columns)
      : positive(num_rows), row_lse(num_rows), column_best(num_columns, -std::numeric_limits<T>::infinity()),
        column_total(num_columns, T(0)), column_lse(num_columns), column_weight(num_columns) {}

  std::vector<Positive> positive;            // (N,)
  std::vector<double> row_lse;               // (N,) with the positive
  std::vector<T> column_best, column_total;  // (M,) max ℓ, Σ e^(ℓ − max), without the positives
  std::vector<T> column_lse, column_weight;  // (M,) with the positive; of a column's loss in the whole
};

template <typename T, typename F>
void each_row(const Prepared<T>& p, LogitBlock<T>& block, F f) {
  each_range(p, block, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(block.first + r, block.logits.row(r));
  });
}

template <typename T>
void row_statistics(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out, BothDirections<T>& kept) {
  const RowKernels<T>& k = row_kernels<T>();
  each_row(p, block, [&](int64_t i, T* row) {
    const Positive positive = kept.positive[i] = find_positive(p, block, i);
    const Largest<T> largest = mask_and_scale(p, i, row, -kLeftOut<T>);
    out.positive[i] = T(positive.similarity);
    out.hardest[i] = largest.similarity;
    const T offset = std::max(largest.logit, T(positive.logit));
    const double negative_lse = double(offset) + std::log(double(k.exp_sum(row, offset, p.num_columns)));
    out.negative_lse[i] = T(negative_lse);
    kept.row_lse[i] = logaddexp(negative_lse, positive.logit);
  });
}

template <typename T>
void column_statistics(const Prepared<T>& p, const LogitBlock<T>& block, BothDirections<T>& kept) {
  constexpr int64_t kSlice = 256;
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t count = block.count, slices = (p.num_columns + kSlice - 1) / kSlice;
  torch::stable::parallel_for(0, slices, std::max<int64_t>(1, kGrain / (kSlice * count)), [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t j = s * kSlice, width = std::min(kSlice, p.num_columns - j);
      T before[kSlice];
      T *best = kept.column_best.data() + j, *total = kept.column_total.data() + j;
      std::copy(best, best + width, before);
      for (int64_t r = 0; r < count; ++r) k.column_max(block.logits.row(r) + j, best, width);
      for (int64_t c = 0; c < width; ++c)
        if (before[c] != best[c]) total[c] *= std::exp(before[c] - best[c]);
      for (int64_t r = 0; r < count; ++r) k.column_exp_sum(block.logits.row(r) + j, best, total, width);
    }
  });
}

template <typename T>
void finish_statistics(const Prepared<T>& p, const Results<T>& out, BothDirections<T>& kept) {
  for (int64_t j = 0; j < p.query.rows; ++j) {
    const double column_lse = double(kept.column_best[j]) + std::log(double(kept.column_total[j]));
    const double logit = kept.positive[j].logit, row_lse = double(out.negative_lse[j]);
    out.column_lse[j] = T(column_lse);
    out.loss[j] = T((log1p_exp(row_lse - logit) + log1p_exp(column_lse - logit)) / 2);
    kept.column_lse[j] = T(logaddexp(column_lse, logit));
    kept.column_weight[j] = T(p.problem.weight(j) / 2);
  }
}

// In place of the block's logits ∂loss/∂(k_j · q̂).
template <typename T>
void similarity_gradients(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out, const BothDirections<T>& kept,
                          std::vector<double>& moment) {
  const RowKernels<T>& k = row_kernels<T>();
  const double scale = p.problem.scale, share = scale / p.keys().scale(scale);  // of a logit that is scale · similarity
  each_row(p, block, [&](int64_t i, T* row) {
    const Positive& positive = kept.positive[i];
    const double weight = p.problem.weight(i) / 2;
    const double of_negatives =
        k.symmetric_weigh(row, T(kept.row_lse[i]), T(weight), kept.column_lse.data(), kept.column_weight.data(),
                          p.column_factor.data(), T(scale), p.num_columns);
    const double positive_weight = -weight * (std::exp(double(out.negative_lse[i]) - kept.row_lse[i]) +
                                              std::exp(double(out.column_lse[i]) - logaddexp(out.column_lse[i], positive.logit)));
    block.row_factor[i - block.first] = T(1);
    block.positive_entry[i - block.first] = positive_weight * positive.derivative * scale;
    moment[i] = share * of_negatives + positive_weight * positive.logit;
  });
}

template <typename T>
void both_directions(const Prepared<T>& p, const RowBlocks& blocks, LogitBlock<T>& block, const Results<T>& out,
                     std::vector<double>& moment) {
  const int64_t n = p.query.rows;
  BothDirections<T> kept(n, p.num_columns);
  blocks.each([&](int64_t first, int64_t count) {
    take_similarities(p, block, first, count);
    row_statistics(p, block, out, kept);
    column_statistics(p, block, kept);
  });
  finish_statistics(p, out, kept);
  if (!wants_gradients(p.problem, out)) return;
  blocks.each([&](int64_t first, int64_t count) {
    if (count < n) {  // a single block still holds its logits
      take_similarities(p, block, first, count);
      each_row(p, block, [&](int64_t i, T* row) { mask_and_scale(p, i, row, -kLeftOut<T>); });
    }
    similarity_gradients(p, block, out, kept, moment);
    add_to_gradients(p, block, out);
  });
}

}  // namespace hicl
