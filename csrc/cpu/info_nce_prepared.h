// A call's vectors made ready: norms, the columns' places in a row of logits, their groups' indices.
//
// Inputs are not copied into normalised form (too long rows apart, unit_rows.h): the columns' factors 1/‖k‖ go into the logits
// and into the gradient of the similarities.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "equal_products.h"
#include "groups.h"
#include "info_nce_problem.h"
#include "matmul.h"
#include "row_blocks.h"
#include "unit_rows.h"

namespace hicl {

constexpr int64_t kMaxChunk = 4096;  // of keys in one product, where hard negatives are chosen

// A kind of column made ready.
template <typename T>
struct Kind {
  Columns<T> rules;
  UnitRows<T> unit;   // (C, D)
  int64_t first;      // its first column among a row's
  std::vector<GroupIndex> relations;  // its columns' groups, by relation, where they aren't ordinary

  int64_t count() const { return unit.count(); }
  double scale(double of_all) const { return of_all + rules.hardness; }  // of its logits
  int64_t special_column(int64_t i) const { return first + (rules.special_column ? rules.special_column[i] : i); }
  // f(j) for the columns of row i's group, j from 0 and not from `first`; once for each relation by which they are.
  template <typename F>
  void each_of_group(int64_t i, F f) const {
    const int64_t* ids = rules.query_group + i * rules.num_relations;
    for (const GroupIndex& relation : relations)
      for (const int64_t j : relation.of(*ids++)) f(j);
  }
  // f(j) for the columns that row i's list leaves out, j from 0.
  template <typename F>
  void each_listed(int64_t i, F f) const {
    if (!rules.left_out_offsets) return;
    for (int64_t at = rules.left_out_offsets[i]; at < rules.left_out_offsets[i + 1]; ++at) f(rules.left_out[at]);
  }
};

// A row of logits has the kinds' columns one after the other, then the extra logits, then the mixtures.
template <typename T>
struct Prepared {
  explicit Prepared(const Problem<T>& problem)
      : problem(problem), unit_query(problem.query.data, problem.query.rows, problem.query.columns), query(problem.query) {
    query.data = unit_query.row(0);
    for (const Columns<T>& columns : problem.columns)
      if (columns.count > 0 || kinds.empty()) add(columns);
    num_columns = num_similarities + problem.num_extra + (problem.mixing ? problem.mixing->num_mixed : 0);
    column_factor.resize(num_columns, T(1));
  }

  const Kind<T>& keys() const { return kinds[0]; }
  int64_t target(int64_t i) const { return keys().special_column(i); }
  Chunks key_chunks() const { return {keys().count(), kColumnMultiple<T>, kMaxChunk}; }
  int64_t row_stride() const {
    return row_stride_for<T>(problem.mixing ? std::max(num_columns, key_chunks().width()) : num_columns);
  }
  int64_t most_block_rows() const {
    return problem.mixing ? std::min(kMostBlockRows, BlockMixing<T>::most_rows(problem.mixing->k)) : kMostBlockRows;
  }

  const Problem<T>& problem;
  UnitRows<T> unit_query;
  Matrix<const T> query;  // (N, D) the rows that `unit_query` has the factors of
  std::vector<Kind<T>> kinds;
  std::vector<T> column_factor;  // (columns,) 1/‖k‖; 1 for those that are no similarities
  std::vector<T> logit_factor;   // (similarities,) the same, but 1 for a zero row
  int64_t num_similarities = 0, num_columns = 0;
  bool has_hardness = false;

 private:
  void add(const Columns<T>& columns) {
    std::vector<GroupIndex> relations;
    if (columns.groups != Groups::kOrdinary)
      for (int64_t g = 0; g < columns.num_relations; ++g)
        relations.emplace_back(columns.group + g, columns.count, columns.num_relations);
    kinds.push_back({columns, UnitRows<T>(columns.vectors, columns.count, query.columns), num_similarities, std::move(relations)});
    const UnitRows<T>& unit = kinds.back().unit;
    column_factor.insert(column_factor.end(), unit.factors(), unit.factors() + columns.count);
    for (int64_t j = 0; j < columns.count; ++j) {
      const T factor = unit.factor(j);
      logit_factor.push_back(factor == 0 ? T(1) : factor);  // −inf, where a column is left out, times 0 would be NaN
    }
    num_similarities += columns.count;
    has_hardness |= columns.hardness != 0;
  }
};

}  // namespace hicl
