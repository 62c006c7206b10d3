// The k keys that are most similar to each query, found over blocks of rows and chunks of columns.
//
// A block of similarities (R, C) is the largest thing there is. Each chunk of keys is brought to the type of the sums as
// it is reached, so that the extra memory doesn't grow with the number of keys, whatever their type and strides.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "equal_products.h"
#include "groups.h"
#include "matmul.h"
#include "memory.h"
#include "row_blocks.h"
#include "rows.h"
#include "tensors.h"
#include "top_k.h"
#include "unit_rows.h"

namespace hicl {
namespace {

constexpr int64_t kMostColumns = 4096;

template <typename T>
Tensor rows_of(Tensor matrix, int64_t first, int64_t count) {
  return torch::stable::contiguous(
      torch::stable::to(torch::stable::narrow(matrix, 0, first, count), kScalarType<T>));
}

template <typename T>
class Miner {
 public:
  // `operand_bytes`: of a block's queries, and of a chunk's keys
  Miner(const Tensor& query, const Tensor& key, int64_t k, int64_t operand_bytes)
      : query_(query), key_(key), n_(query.size(0)), m_(key.size(0)), d_(query.size(1)), k_(k),
        chunks_(m_, kColumnMultiple<T>,
                RowBlocks(m_, d_ * int64_t(sizeof(T)), operand_bytes, kMostColumns, kColumnMultiple<T>).rows()),
        blocks_(n_, d_ * int64_t(sizeof(T)), operand_bytes, kMostBlockRows),
        row_stride_(row_stride_for<T>(chunks_.width())) {}

  void exclude_target(const int64_t* target) { excludes_target_ = true, target_ = target; }
  void exclude_groups(const int64_t* query_group, const int64_t* key_group) {
    query_group_ = query_group, key_group_ = key_group;
  }

  void run(T* similarity, int64_t* index) {
    Workspace workspace(BlockRows<T>::bytes(blocks_, row_stride_) + BlockRows<T>::bytes(blocks_, d_));
    similarities_ = BlockRows<T>(blocks_, row_stride_, workspace);
    unit_query_ = BlockRows<T>(blocks_, d_, workspace);
    best_.assign(std::min(n_, blocks_.rows()), TopK<T>(k_));
    blocks_.each([&](int64_t first, int64_t count) {
      prepare_queries(first, count);
      for (int64_t column = 0; column < m_; column += chunks_.width()) search(first, count, column);
      each_row(count, k_, [&](int64_t r) { best_[r].take(similarity + (first + r) * k_, index + (first + r) * k_); });
    });
  }

 private:
  template <typename F>
  void each_row(int64_t count, int64_t row_length, F f) {
    torch::stable::parallel_for(0, count, rows_per_thread(row_length), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r);
    });
  }

  void prepare_queries(int64_t first, int64_t count) {
    const Tensor block = rows_of<T>(query_, first, count);
    const UnitRows<T> unit(block.const_data_ptr<T>(), count, d_);
    each_row(count, d_, [&](int64_t r) { k_rows_.scale(unit.row(r), unit.factor(r), unit_query_.row(r), d_); });
  }

  // Offers the columns from `column` to the end of its chunk to a block of rows.
  void search(int64_t first, int64_t count, int64_t column) {
    const int64_t begin = chunks_.begin(column), end = chunks_.end(column), width = end - begin;
    const Tensor chunk = rows_of<T>(key_, begin, width);
    const UnitRows<T> keys(chunk.const_data_ptr<T>(), width, d_);
    const Matrix<T> queries = unit_query_.filled_up(count);
    multiply_chunk(similarities_.part(queries.rows, 0, width), queries, Matrix<const T>{keys.row(0), width, d_, d_},
                   chunks_.width(), padded_);
    const GroupIndex groups = key_group_ ? GroupIndex(key_group_ + begin, width) : GroupIndex();
    each_row(count, width, [&](int64_t r) {
      T* row = similarities_.row(r);
      k_rows_.to_logits(row, keys.factors(), T(1), width);
      leave_out(first + r, row, begin, end, groups);
      best_[r].offer(row + (column - begin), column, end - column);
    });
  }
  void leave_out(int64_t i, T* row, int64_t begin, int64_t end, const GroupIndex& groups) const {
    constexpr T kNothing = -std::numeric_limits<T>::infinity();
    const int64_t target = !excludes_target_ ? -1 : target_ ? target_[i] : i;
    if (begin <= target && target < end) row[target - begin] = kNothing;
    if (key_group_)
      for (const int64_t j : groups.of(query_group_[i])) row[j] = kNothing;
  }

  const RowKernels<T>& k_rows_ = row_kernels<T>();
  Tensor query_, key_;
  int64_t n_, m_, d_, k_;
  Chunks chunks_;
  RowBlocks blocks_;
  int64_t row_stride_;
  bool excludes_target_ = false;
  const int64_t *target_ = nullptr, *query_group_ = nullptr, *key_group_ = nullptr;

  BlockRows<T> similarities_, unit_query_;  // (R, row stride), (R, D); in the workspace of `run`
  std::vector<T> padded_;
  std::vector<TopK<T>> best_;  // (R,)
};

template <typename T>
std::tuple<Tensor, Tensor> run(const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& target,
                               const OptionalTensor& query_group, const OptionalTensor& key_group, bool exclude_target,
                               int64_t operand_bytes) {
  const int64_t n = query.size(0);
  Tensor similarity = new_tensor<T>({n, k}), index = new_tensor<int64_t>({n, k});
  Miner<T> miner(query, key, k, operand_bytes);
  if (exclude_target) miner.exclude_target(data<int64_t>(target));
  miner.exclude_groups(data<int64_t>(query_group), data<int64_t>(key_group));
  miner.run(data<T>(similarity), data<int64_t>(index));
  return {similarity, index};
}

std::tuple<Tensor, Tensor> hard_negatives(const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& target,
                                          const OptionalTensor& query_group, const OptionalTensor& key_group,
                                          bool exclude_target, int64_t operand_bytes) {
  const TensorChecks check("hard_negatives", query);
  const auto types = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  check.of_any("query", query, types, {kAny, kAny});
  const int64_t n = query.size(0), d = query.size(1);
  check.that(d > 0, "query", "expected at least one dimension, got 0");
  check.of_any("key", key, types, {kAny, d});
  const int64_t m = key.size(0);
  check.that(0 < k && k <= m, "k", "expected 1 to ", m, ", got ", k);  // before memory is asked for
  check("target", target, ScalarType::Long, {n});
  check.groups(query_group, n, key_group, m);
  const bool is_double = query.scalar_type() == ScalarType::Double || key.scalar_type() == ScalarType::Double;
  return (is_double ? run<double> : run<float>)(query, key, k, target, query_group, key_group, exclude_target,
                                                 operand_bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "hard_negatives(Tensor query, Tensor key, int k, Tensor? target, Tensor? query_group, Tensor? key_group, "
      "bool exclude_target, int operand_bytes=33554432) -> (Tensor similarity, Tensor index)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) { m.impl("hard_negatives", TORCH_BOX(&hard_negatives)); }

}  // namespace hicl
