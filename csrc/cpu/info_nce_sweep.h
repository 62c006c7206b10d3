// Loss and gradients in one sweep over blocks of rows: what the sweep holds, and its course.
//
// A block's logits (R, C), every column of R rows, are the largest thing there is. For each block: one product gives
// the raw similarities; each row, in cache, goes from similarities to softmax to ∂loss/∂similarity; two products add to
// the gradients. That is 6 N C D operations, three matrix products, and two passes over R × C elements in cache.
// Inputs are not copied into normalised form (too long rows apart, unit_rows.h): the keys' factors 1/‖k‖ go into the logits and into ∂loss/∂similarity;
// a row's weight · probability factor goes into the small operand of the products, not over its C elements.
//
// The symmetric loss must see every row of a column before the column's softmax is known: it sweeps twice, 8 N C D,
// unless one block holds everything.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "block_mixing.h"
#include "equal_products.h"
#include "groups.h"
#include "info_nce_problem.h"
#include "matmul.h"
#include "memory.h"
#include "row_blocks.h"
#include "rows.h"
#include "unit_rows.h"

namespace hicl {

constexpr int64_t kMaxChunk = 4096;  // of keys in one product, where hard negatives are chosen

template <typename T>
class Sweep {
 public:
  Sweep(Matrix<const T> query, const Rules& rules, const Outputs<T>& out, Wanted wanted)
      : query_(query), unit_query_(query.data, query.rows, query.columns), rules_(rules), out_(out), wanted_(wanted) {
    query_.data = unit_query_.row(0);
  }

  void add_segment(const T* rows, int64_t count, T* gradient) {
    if (count == 0 && !segments_.empty()) return;
    segments_.push_back({UnitRows<T>(rows, count, query_.columns), num_similarities_, gradient});
    column_factor_.insert(column_factor_.end(), segments_.back().unit.factors(),
                          segments_.back().unit.factors() + count);
    for (int64_t j = 0; j < count; ++j) {
      const T factor = segments_.back().unit.factor(j);
      logit_factor_.push_back(factor == 0 ? T(1) : factor);  // −inf, where a column is left out, times 0 would be NaN
    }
    num_similarities_ += count;
  }
  void set_target(const int64_t* target) { target_ = target; }
  void set_extra(const T* logits, int64_t count) { extra_ = logits, num_extra_ = count; }
  void set_own_negatives(int64_t first) { first_own_ = rules_.hard_negative_weight != 0 ? first : -1; }
  void set_groups(const int64_t* query_group, const int64_t* key_group) {
    if (query_group && rules_.same_group != SameGroup::kNegative) {
      query_group_ = query_group;
      groups_ = GroupIndex(key_group, segments_[0].unit.count());
    }
  }
  // Mixtures of each row's hardest keys are further columns, after the extra logits.
  void set_mixing(const MixingRules& rules) { mixing_rules_ = rules; }
  // One weight for all rows, and one for each where there are any.
  void set_row_weight(double common, const T* each) { common_weight_ = common, row_weight_ = each; }

  // `block_bytes`: of the logits that there are at a time
  void run(int64_t block_bytes) {
    const int64_t n = query_.rows, stride = row_stride();
    const RowBlocks blocks(n, stride * int64_t(sizeof(T)), block_bytes, most_block_rows());
    num_columns_ = num_columns();
    column_factor_.resize(num_columns_, T(1));
    Workspace workspace(BlockRows<T>::bytes(blocks, stride) + BlockRows<T>::bytes(blocks, query_.columns) +
                        BlockMixing<T>::bytes(mixing_rules_, blocks.rows()));
    logits_ = BlockRows<T>(blocks, stride, workspace);
    unit_block_ = BlockRows<T>(blocks, query_.columns, workspace);
    if (mixing_rules_) mixing_.emplace(*mixing_rules_, query_, segments_[0].unit, blocks.rows(), workspace);
    row_factor_.resize(blocks.rows());
    positive_entry_.resize(blocks.rows());
    moment_.assign(n, 0.0);
    if (rules_.symmetric) prepare_both_directions();

    blocks.each([&](int64_t first, int64_t count) {
      similarities(first, count);
      if (rules_.symmetric) {
        each_row(first, count, [&](int64_t i, T* row) { symmetric_statistics(i, row); });
        column_statistics(count);
      } else {
        each_range(count, [&](int64_t begin, int64_t end) {
          std::optional<MixingRow> mixing;
          if (mixing_) mixing.emplace(*mixing_);
          for (int64_t r = begin; r < end; ++r) one_direction(first + r, r, logits(r), mixing ? &*mixing : nullptr);
        });
        if (wanted_.any()) products(first, count);
      }
    });
    if (rules_.symmetric) second_sweep(blocks);
    if (wanted_.any()) finish_gradients();
    *out_.total = T(common_weight_ * std::accumulate(out_.loss, out_.loss + n, 0.0));
  }

 private:
  using MixingRow = typename BlockMixing<T>::Row;

  int64_t num_columns() const {
    return num_similarities_ + num_extra_ + (mixing_rules_ ? mixing_rules_->num_mixed : 0);
  }
  Chunks key_chunks() const { return {segments_[0].unit.count(), kColumnMultiple<T>, kMaxChunk}; }
  int64_t row_stride() const {
    return row_stride_for<T>(mixing_rules_ ? std::max(num_columns(), key_chunks().width()) : num_columns());
  }
  int64_t most_block_rows() const {
    return mixing_rules_ ? std::min(kMostBlockRows, BlockMixing<T>::most_rows(mixing_rules_->k)) : kMostBlockRows;
  }
  T* logits(int64_t r) { return logits_.row(r); }
  int64_t target(int64_t i) const { return target_ ? target_[i] : i; }
  double row_weight(int64_t i) const { return row_weight_ ? common_weight_ * double(row_weight_[i]) : common_weight_; }
  Matrix<T> unit_block(int64_t count) { return unit_block_.part(count, 0, query_.columns); }

  template <typename F>
  void each_range(int64_t count, F f) {
    torch::stable::parallel_for(0, count, rows_per_thread(num_columns_), f);
  }
  template <typename F>
  void each_row(int64_t first, int64_t count, F f) {
    each_range(count, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(first + r, logits(r));
    });
  }

  template <typename F>
  void each_block_row(int64_t count, F f) {
    torch::stable::parallel_for(0, count, rows_per_thread(query_.columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, unit_block_.row(r));
    });
  }

  Matrix<T> columns_of(const Segment<T>& s, int64_t count) {
    return logits_.part(count, s.first, s.unit.count());
  }

  // info_nce_products.h
  void similarities(int64_t first, int64_t count);
  void key_similarities(int64_t count);
  void products(int64_t first, int64_t count);
  void finish_query_gradient(int64_t first, int64_t count, T* query_gradient);
  void add_positives(int64_t first, int64_t count, T* key_gradient);
  void finish_gradients();

  // info_nce_one_direction.h
  // The row's own negative and, where several are positives, the others, taken out of the row before the softmax.
  struct Apart {
    T own_logit = -std::numeric_limits<T>::infinity();  // with its bias
    T own_similarity = -std::numeric_limits<T>::infinity();
    std::vector<std::pair<int64_t, T>> positives;  // column, logit

    double shift(const Positive& p) const {  // the positive's logit minus the mean logit of all positives
      double sum = 0;
      for (const auto& [column, logit] : positives) sum += p.logit - double(logit);
      return sum / double(1 + positives.size());
    }
  };
  Positive find_positive(int64_t i) const;
  T mask_and_scale(int64_t i, T* row, const Positive& positive);
  Apart take_apart(int64_t i, T* row, const Positive& positive);
  void one_direction(int64_t i, int64_t r, T* row, MixingRow* mixing);

  // info_nce_both_directions.h
  void prepare_both_directions();
  void symmetric_statistics(int64_t i, T* row);
  void column_statistics(int64_t count);
  void second_sweep(const RowBlocks& blocks);

  const RowKernels<T>& k_ = row_kernels<T>();
  Matrix<const T> query_;
  UnitRows<T> unit_query_;
  Rules rules_;
  Outputs<T> out_;
  Wanted wanted_;

  std::vector<Segment<T>> segments_;  // the first holds the keys
  std::vector<T> column_factor_, logit_factor_;
  int64_t num_similarities_ = 0, num_extra_ = 0, num_columns_ = 0, first_own_ = -1;
  const T *extra_ = nullptr, *row_weight_ = nullptr;
  double common_weight_ = 1;
  const int64_t *target_ = nullptr, *query_group_ = nullptr;
  GroupIndex groups_;
  std::optional<MixingRules> mixing_rules_;
  std::optional<BlockMixing<T>> mixing_;
  std::vector<T> padded_keys_;

  BlockRows<T> logits_, unit_block_;                       // (R, row stride), (R, D); in the workspace of `run`
  std::vector<T> row_factor_;                              // (R,) what ∂loss/∂(k_j · q̂) is of the row's entries
  std::vector<double> positive_entry_;                     // (R,) the positive's entry, without ‖k‖⁻¹
  std::vector<double> moment_;                             // (N,) each row's part of the scale's gradient
  std::vector<Positive> positive_;                         // (N,) kept for the second sweep
  std::vector<T> column_best_, column_total_, full_column_lse_, column_weight_;
  std::vector<double> full_row_lse_;
  int64_t block_first_ = 0;
};

}  // namespace hicl

#include "info_nce_both_directions.h"
#include "info_nce_one_direction.h"
#include "info_nce_products.h"
