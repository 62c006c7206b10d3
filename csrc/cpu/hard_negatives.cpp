// The k keys that are most similar to each query, found over blocks of rows and chunks of columns.
//
// A block of similarities (R, C) is the largest thing there is. Each chunk of keys is brought to the type of the sums as
// it is reached, so that the extra memory doesn't grow with the number of keys, whatever their type and strides.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "equal_products.h"
#include "groups.h"
#include "matmul.h"
#include "memory.h"
#include "rows.h"
#include "tensors.h"
#include "top_k.h"
#include "unit_rows.h"

namespace hicl {
namespace {

constexpr int64_t kMaxRows = 1024, kMaxColumns = 4096;
constexpr int64_t kOperandBytes = 32 << 20;  // of a block's queries, and of a chunk's keys

template <typename T>
int64_t operand_rows(int64_t d, int64_t multiple, int64_t most) {
  return std::max(multiple, std::min(most, kOperandBytes / (d * int64_t(sizeof(T)))) / multiple * multiple);
}

template <typename T>
Tensor rows_of(Tensor matrix, int64_t first, int64_t count) {
  return torch::stable::contiguous(
      torch::stable::to(torch::stable::narrow(matrix, 0, first, count), kScalarType<T>));
}

template <typename T>
class Miner {
 public:
  Miner(const Tensor& query, const Tensor& key, int64_t k)
      : query_(query), key_(key), n_(query.size(0)), m_(key.size(0)), d_(query.size(1)), k_(k),
        chunks_(m_, kColumnMultiple<T>, operand_rows<T>(d_, kColumnMultiple<T>, kMaxColumns)),
        block_rows_(std::min(rounded_up(n_, kRowMultiple), operand_rows<T>(d_, kRowMultiple, kMaxRows))),
        row_stride_(chunks_.width() + 64 / int64_t(sizeof(T))) {}  // a power of two would fall into few lines of the cache

  void exclude_target(const int64_t* target) { excludes_target_ = true, target_ = target; }
  void exclude_groups(const int64_t* query_group, const int64_t* key_group) {
    query_group_ = query_group, key_group_ = key_group;
  }

  void run(T* similarity, int64_t* index) {
    Workspace workspace(Workspace::bytes_of<T>(block_rows_ * row_stride_) + Workspace::bytes_of<T>(block_rows_ * d_));
    similarities_ = workspace.take<T>(block_rows_ * row_stride_);
    unit_query_ = workspace.take<T>(block_rows_ * d_);
    best_.assign(std::min(n_, block_rows_), TopK<T>(k_));
    for (int64_t first = 0; first < n_; first += block_rows_) {
      const int64_t count = std::min(block_rows_, n_ - first);
      prepare_queries(first, count);
      for (int64_t column = 0; column < m_; column += chunks_.width()) search(first, count, column);
      each_row(count, k_, [&](int64_t r) { best_[r].take(similarity + (first + r) * k_, index + (first + r) * k_); });
    }
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
    each_row(count, d_, [&](int64_t r) { k_rows_.scale(unit.row(r), unit.factor(r), unit_query_ + r * d_, d_); });
    std::fill(unit_query_ + count * d_, unit_query_ + rounded_up(count, kRowMultiple) * d_, T(0));
  }

  // Offers the columns from `column` to the end of its chunk to a block of rows.
  void search(int64_t first, int64_t count, int64_t column) {
    const int64_t begin = chunks_.begin(column), end = chunks_.end(column), width = end - begin;
    const Tensor chunk = rows_of<T>(key_, begin, width);
    const UnitRows<T> keys(chunk.const_data_ptr<T>(), width, d_);
    const int64_t rows = rounded_up(count, kRowMultiple);
    multiply_chunk(Matrix<T>{similarities_, rows, width, row_stride_}, Matrix<T>{unit_query_, rows, d_, d_},
                   Matrix<const T>{keys.row(0), width, d_, d_}, chunks_.width(), padded_);
    const GroupIndex groups = key_group_ ? GroupIndex(key_group_ + begin, width) : GroupIndex();
    each_row(count, width, [&](int64_t r) {
      T* row = similarities_ + r * row_stride_;
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
  int64_t block_rows_, row_stride_;
  bool excludes_target_ = false;
  const int64_t *target_ = nullptr, *query_group_ = nullptr, *key_group_ = nullptr;

  T *similarities_ = nullptr, *unit_query_ = nullptr;  // (R, row stride), (R, D); in the workspace of `run`
  std::vector<T> padded_;
  std::vector<TopK<T>> best_;  // (R,)
};

template <typename T>
std::tuple<Tensor, Tensor> run(const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& target,
                               const OptionalTensor& query_group, const OptionalTensor& key_group, bool exclude_target) {
  const int64_t n = query.size(0);
  Tensor similarity = new_tensor<T>({n, k}), index = new_tensor<int64_t>({n, k});
  Miner<T> miner(query, key, k);
  if (exclude_target) miner.exclude_target(data<int64_t>(target));
  miner.exclude_groups(data<int64_t>(query_group), data<int64_t>(key_group));
  miner.run(data<T>(similarity), data<int64_t>(index));
  return {similarity, index};
}

std::tuple<Tensor, Tensor> hard_negatives(const Tensor& query, const Tensor& key, int64_t k, const OptionalTensor& target,
                                          const OptionalTensor& query_group, const OptionalTensor& key_group,
                                          bool exclude_target) {
  const bool is_double = query.scalar_type() == ScalarType::Double || key.scalar_type() == ScalarType::Double;
  return (is_double ? run<double> : run<float>)(query, key, k, target, query_group, key_group, exclude_target);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "hard_negatives(Tensor query, Tensor key, int k, Tensor? target, Tensor? query_group, Tensor? key_group, "
      "bool exclude_target) -> (Tensor similarity, Tensor index)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) { m.impl("hard_negatives", TORCH_BOX(&hard_negatives)); }

}  // namespace hicl
