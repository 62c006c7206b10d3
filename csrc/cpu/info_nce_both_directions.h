// The symmetric loss: statistics of rows and columns in a first sweep, gradients in a second.
#pragma once
#include <cmath>

#include "info_nce_sweep.h"

namespace hicl {

template <typename T>
void Sweep<T>::prepare_both_directions() {
  positive_.resize(query_.rows);
  column_best_.assign(num_columns_, -std::numeric_limits<T>::infinity());
  column_total_.assign(num_columns_, T(0));
  full_row_lse_.resize(query_.rows);
  full_column_lse_.resize(num_columns_);
  column_weight_.resize(num_columns_);
}

template <typename T>
void Sweep<T>::symmetric_statistics(int64_t i, T* row) {
  const Positive positive = positive_[i] = find_positive(i);
  const T best = mask_and_scale(i, row, positive);
  out_.positive[i] = T(positive.similarity);
  out_.hardest[i] = best / T(rules_.scale);
  const T offset = std::max(best, T(positive.logit));
  const double negative_lse = double(offset) + std::log(double(k_.exp_sum(row, offset, num_columns_)));
  out_.negative_lse[i] = T(negative_lse);
  full_row_lse_[i] = logaddexp(negative_lse, positive.logit);
}

template <typename T>
void Sweep<T>::column_statistics(int64_t count) {
  constexpr int64_t kSlice = 256;
  const int64_t slices = (num_columns_ + kSlice - 1) / kSlice;
  torch::stable::parallel_for(0, slices, std::max<int64_t>(1, kGrain / (kSlice * count)), [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t j = s * kSlice, width = std::min(kSlice, num_columns_ - j);
      T before[kSlice];
      T *best = column_best_.data() + j, *total = column_total_.data() + j;
      std::copy(best, best + width, before);
      for (int64_t r = 0; r < count; ++r) k_.column_max(logits(r) + j, best, width);
      for (int64_t c = 0; c < width; ++c)
        if (before[c] != best[c]) total[c] *= std::exp(before[c] - best[c]);
      for (int64_t r = 0; r < count; ++r) k_.column_exp_sum(logits(r) + j, best, total, width);
    }
  });
}

template <typename T>
void Sweep<T>::second_sweep(const RowBlocks& blocks) {
  const int64_t n = query_.rows;
  for (int64_t j = 0; j < n; ++j) {
    const double column_lse = double(column_best_[j]) + std::log(double(column_total_[j]));
    const double logit = positive_[j].logit, row_lse = double(out_.negative_lse[j]);
    out_.column_lse[j] = T(column_lse);
    out_.loss[j] = T((log1p_exp(row_lse - logit) + log1p_exp(column_lse - logit)) / 2);
    full_column_lse_[j] = T(logaddexp(column_lse, logit));
  }
  if (!wanted_.any()) return;
  for (int64_t j = 0; j < n; ++j) column_weight_[j] = T(row_weight(j) / 2);
  blocks.each([&](int64_t first, int64_t count) {
    if (count < n) similarities(first, count);  // a single block still holds its logits
    each_row(first, count, [&](int64_t i, T* row) {
      const Positive& positive = positive_[i];
      if (count < n) mask_and_scale(i, row, positive);
      const double weight = row_weight(i) / 2;
      const double moment = k_.symmetric_weigh(row, T(full_row_lse_[i]), T(weight), full_column_lse_.data(),
                                               column_weight_.data(), column_factor_.data(), T(rules_.scale), num_columns_);
      const double positive_weight =
          -weight * (std::exp(double(out_.negative_lse[i]) - full_row_lse_[i]) +
                     std::exp(double(out_.column_lse[i]) - logaddexp(out_.column_lse[i], positive.logit)));
      row_factor_[i - first] = T(1);
      positive_entry_[i - first] = positive_weight * positive.slope * rules_.scale;
      moment_[i] = moment + positive_weight * positive.logit;
    });
    products(first, count);
  });
}

}  // namespace hicl
