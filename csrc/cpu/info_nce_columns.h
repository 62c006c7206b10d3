// The kinds of column, and how they come to the operator.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "../constants.h"
#include "matmul.h"
#include "tensors.h"

namespace hicl {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

// A kind of column: vectors that every query is compared with, and the rules that hold for them. A new rule is a field
// here, which `columns_of` fills in, and its line in info_nce_row.h.
template <typename T>
struct Columns {
  const T* vectors = nullptr;  // (C, D)
  int64_t count = 0;
  Special special = Special::kNothing;
  const int64_t* special_column = nullptr;  // (N,); null: row i's is column i
  double bias = 0;                          // added to the logit of a row's own negative
  Groups groups = Groups::kOrdinary;
  const int64_t* query_group = nullptr;  // (N, G), where the groups aren't ordinary: an id for each relation
  const int64_t* group = nullptr;        // (C, G), likewise
  int64_t num_relations = 0;             // G
  double hardness = 0;                   // times the similarity, held constant, is added to the logits
  const int64_t* left_out = nullptr;     // (T,) columns that one row each is without; null: none
  const int64_t* left_out_offsets = nullptr;  // (N + 1,) row i is without those from offset i to the next
  T* gradient = nullptr;                 // out (C, D); null where it isn't wanted

  bool is_of_group(int64_t i, int64_t column) const {
    const int64_t *of_row = query_group + i * num_relations, *of_column = group + column * num_relations;
    for (int64_t g = 0; g < num_relations; ++g)
      if (of_row[g] == of_column[g]) return true;
    return false;
  }
};

// The kinds of column as the operator takes them: of each kind its tensors, and its numbers, in the order of the fields of
// KindOfColumn in hicl_fast/ops/info_nce/problem.py. Two lists, since each costs a small call a microsecond.
enum TensorRule { kVectors, kSpecialColumn, kQueryGroup, kGroup, kLeftOutColumns, kLeftOutOffsets, kNumTensorRules };
enum NumberRule { kWantsGradient, kSpecial, kBias, kGroups, kHardness, kNumNumberRules };

struct ColumnLists {
  const OptionalTensors& tensors;
  const std::vector<double>& numbers;

  size_t count() const { return tensors.size() / kNumTensorRules; }
  bool are_whole() const {
    return count() > 0 && tensors.size() == count() * kNumTensorRules && numbers.size() == count() * kNumNumberRules;
  }
  const OptionalTensor& tensor(size_t kind, TensorRule rule) const { return tensors[kind * kNumTensorRules + rule]; }
  double number(size_t kind, NumberRule rule) const { return numbers[kind * kNumNumberRules + rule]; }
  // −1 where the number is no code.
  int64_t code(size_t kind, NumberRule rule) const {
    const double x = number(kind, rule);
    return x == 0 || x == 1 || x == 2 ? int64_t(x) : -1;
  }
  Special special(size_t kind) const { return Special(code(kind, kSpecial)); }
  Groups groups(size_t kind) const { return Groups(code(kind, kGroups)); }
  const Tensor& vectors(size_t kind) const { return *tensor(kind, kVectors); }
  bool wants_gradient(size_t kind) const { return number(kind, kWantsGradient) != 0; }
};

template <typename T>
std::vector<Columns<T>> columns_of(const ColumnLists& lists, Tensors& gradients) {
  std::vector<Columns<T>> found;
  for (size_t kind = 0; kind < lists.count(); ++kind) {
    Columns<T> columns;
    columns.vectors = lists.vectors(kind).const_data_ptr<T>();
    columns.count = lists.vectors(kind).size(0);
    columns.special = lists.special(kind);
    columns.special_column = data<int64_t>(lists.tensor(kind, kSpecialColumn));
    columns.bias = lists.number(kind, kBias);
    columns.groups = lists.groups(kind);
    columns.query_group = data<int64_t>(lists.tensor(kind, kQueryGroup));
    columns.group = data<int64_t>(lists.tensor(kind, kGroup));
    columns.num_relations = columns.group ? lists.tensor(kind, kGroup)->size(1) : 0;
    columns.hardness = lists.number(kind, kHardness);
    columns.left_out = data<int64_t>(lists.tensor(kind, kLeftOutColumns));
    columns.left_out_offsets = data<int64_t>(lists.tensor(kind, kLeftOutOffsets));
    columns.gradient = lists.wants_gradient(kind) ? data<T>(gradients[kind]) : nullptr;
    found.push_back(columns);
  }
  return found;
}

}  // namespace hicl
