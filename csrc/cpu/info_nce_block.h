// A block of rows: its logits (R, C), every column of R rows, the largest thing there is; and the three products over it.
//
// One product gives the raw similarities; each row, in cache, goes from similarities to softmax to ∂loss/∂s
// (info_nce_one_direction.h, info_nce_both_directions.h); two products add to the gradients. A row's
// weight · probability factor goes into the small operand of the products, not over its C elements.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "block_mixing.h"
#include "equal_products.h"
#include "info_nce_prepared.h"
#include "matmul.h"
#include "memory.h"
#include "row_blocks.h"
#include "rows.h"
#include "unit_rows.h"

namespace hicl {

template <typename T>
struct LogitBlock {
  LogitBlock(const Prepared<T>& p, const RowBlocks& blocks)
      : workspace(BlockRows<T>::bytes(blocks, p.row_stride()) + BlockRows<T>::bytes(blocks, p.query.columns) +
                  BlockMixing<T>::bytes(p.problem.mixing, blocks.rows())),
        logits(blocks, p.row_stride(), workspace), unit_query(blocks, p.query.columns, workspace),
        row_factor(blocks.rows()), positive_entry(blocks.rows()) {
    if (p.problem.mixing) mixing.emplace(*p.problem.mixing, p.query, p.keys().unit, blocks.rows(), workspace);
  }

  Matrix<T> columns_of(const Kind<T>& kind) const { return logits.part(count, kind.first, kind.count()); }
  Matrix<T> queries() const { return unit_query.part(count, 0, unit_query.stride()); }

  Workspace workspace;
  int64_t first = 0, count = 0;  // which rows it holds
  BlockRows<T> logits;           // (R, C): raw similarities k_j · q̂_i; then what the rows make of them
  BlockRows<T> unit_query;       // (R, D)
  std::vector<T> row_factor;     // (R,) what ∂loss/∂(k_j · q̂) is of the row's entries in `logits`
  std::vector<double> positive_entry;  // (R,) the positive's entry, without ‖k‖⁻¹: added apart, in full precision
  std::optional<BlockMixing<T>> mixing;
};

// f(begin, end) for parts of the block's rows, on several threads.
template <typename T, typename F>
void each_range(const Prepared<T>& p, const LogitBlock<T>& block, F f) {
  torch::stable::parallel_for(0, block.count, rows_per_thread(p.num_columns), f);
}

// f(r, q̂ of row r)
template <typename T, typename F>
void each_query(const Prepared<T>& p, LogitBlock<T>& block, F f) {
  torch::stable::parallel_for(0, block.count, rows_per_thread(p.query.columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r, block.unit_query.row(r));
  });
}

// As `hard_negatives` takes the keys' similarities, so that the same keys are chosen.
template <typename T>
void take_similarities_in_chunks(const Prepared<T>& p, LogitBlock<T>& block) {
  const int64_t d = p.query.columns;
  const Matrix<T> queries = block.unit_query.filled_up(block.count);
  const UnitRows<T>& keys = p.keys().unit;
  const Chunks chunks = p.key_chunks();
  std::vector<T> padded_keys;
  for (int64_t column = 0; column < keys.count(); column += chunks.width()) {
    const int64_t begin = chunks.begin(column), end = chunks.end(column);
    multiply_chunk(block.logits.part(queries.rows, begin, chunks.width()), queries,
                   Matrix<const T>{keys.row(begin), end - begin, d, d}, chunks.width(), padded_keys);
  }
}

// logits = q̂_i · k_j for the rows from `first` on and all columns that are similarities.
template <typename T>
void take_similarities(const Prepared<T>& p, LogitBlock<T>& block, int64_t first, int64_t count) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t d = p.query.columns;
  block.first = first, block.count = count;
  each_query(p, block, [&](int64_t r, T* unit_query) {
    k.scale(p.unit_query.row(first + r), p.unit_query.factor(first + r), unit_query, d);
  });
  if (block.mixing) take_similarities_in_chunks(p, block);  // wider than the keys where they are few: before the others
  for (const Kind<T>& kind : p.kinds) {
    if (kind.count() == 0 || (block.mixing && kind.first == 0)) continue;
    matmul(block.columns_of(kind), block.queries(), Matrix<const T>{kind.unit.row(0), kind.count(), d, d}.transposed());
  }
}

// Adds the positive's part and goes back through the normalisation.
template <typename T>
void finish_query_gradient(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t d = p.query.columns;
  const UnitRows<T>&keys = p.keys().unit, &queries = p.unit_query;
  each_query(p, block, [&](int64_t r, const T* unit_query) {
    const int64_t i = block.first + r, j = p.target(i);
    T* gradient = out.query_gradient + i * d;
    const double entry = block.positive_entry[r];
    const double along = double(k.dot(unit_query, gradient, d)) + entry * double(out.positive[i]);
    const double factor = double(queries.factor(i)) * double(block.row_factor[r]);
    const double radial = queries.has_constant_norm(i) ? 0.0 : -along;
    k.combine(gradient, T(factor), T(factor * entry) * keys.factor(j), keys.row(j), T(factor * radial), unit_query, d);
    if (queries.shrink(i) != 1) k.scale(gradient, queries.shrink(i), gradient, d);
  });
}

// dQ = A K with A = ∂loss/∂(k_j · q̂) of the block, which is row_factor times what `logits` holds.
template <typename T>
void add_to_query_gradient(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out) {
  const int64_t d = p.query.columns;
  const Matrix<T> gradient{out.query_gradient + block.first * d, block.count, d, d};
  bool accumulate = false;
  for (const Kind<T>& kind : p.kinds) {
    if (kind.count() == 0) continue;
    matmul(gradient, block.columns_of(kind), Matrix<const T>{kind.unit.row(0), kind.count(), d, d}, accumulate);
    accumulate = true;
  }
  finish_query_gradient(p, block, out);
}

// Several rows may share a positive, so threads share out the dimensions and not the rows.
template <typename T>
void add_positives(const Prepared<T>& p, const LogitBlock<T>& block, T* key_gradient) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t d = p.query.columns;
  const UnitRows<T>& keys = p.keys().unit;
  torch::stable::parallel_for(0, d, std::max<int64_t>(16, kGrain / block.count), [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t j = p.target(block.first + r);
      k.add_scaled(block.unit_query.row(r) + begin, T(block.positive_entry[r]) * keys.factor(j), key_gradient + j * d + begin,
                   end - begin);
    }
  });
}

// dK = Aᵀ Q̂ of every kind of column that wants it.
template <typename T>
void add_to_column_gradients(const Prepared<T>& p, LogitBlock<T>& block) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t d = p.query.columns;
  const auto is_wanted = [](const Kind<T>& kind) { return kind.rules.gradient && kind.count(); };
  if (std::none_of(p.kinds.begin(), p.kinds.end(), is_wanted)) return;
  each_query(p, block, [&](int64_t r, T* unit_query) { k.scale(unit_query, block.row_factor[r], unit_query, d); });
  for (const Kind<T>& kind : p.kinds)
    if (is_wanted(kind))
      matmul(Matrix<T>{kind.rules.gradient, kind.count(), d, d}, block.columns_of(kind).transposed(), block.queries(),
             block.first > 0);
  T* key_gradient = p.keys().rules.gradient;
  if (!key_gradient) return;
  add_positives(p, block, key_gradient);
  if (block.mixing) block.mixing->add_to(key_gradient, block.first, block.first + block.count);
}

template <typename T>
void add_to_gradients(const Prepared<T>& p, LogitBlock<T>& block, const Results<T>& out) {
  if (out.query_gradient) add_to_query_gradient(p, block, out);
  add_to_column_gradients(p, block);
}

// The columns' gradients so far are those by the unit rows times 1/‖k‖.
template <typename T>
void finish_column_gradients(const Prepared<T>& p, const LogitBlock<T>& block) {
  for (const Kind<T>& kind : p.kinds)
    if (kind.rules.gradient)
      kind.unit.project_all(kind.rules.gradient, block.mixing && kind.first == 0 ? block.mixing->kept() : nullptr);
}

}  // namespace hicl
