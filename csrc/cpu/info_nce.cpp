// InfoNCE over cosine similarities as an operator: arguments checked, put into a Problem, and results back into tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "info_nce_both_directions.h"
#include "info_nce_one_direction.h"
#include "row_blocks.h"
#include "tensors.h"

namespace hicl {
namespace {

// What the operator takes and is asked for.
struct Arguments {
  const Tensor& query;
  ColumnLists columns;
  const OptionalTensor &extra_logits, &loss_grad, &negative_grad, &positive_grad, &limit, &mixed_pairs;
  double false_negative_margin, false_negative_ratio, row_weight, scale, margin;
  bool symmetric;
  int64_t k;
  double alpha;
  bool wants_query, wants_extra_logits, wants_scale;
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensor, Tensor, Tensor>;

// "vectors", or "vectors[1]" of kinds after the first
std::string of_kind(const char* name, size_t kind) { return kind ? name + ("[" + std::to_string(kind) + "]") : name; }

// The list of columns that rows are without: of keys, whose groups then make no positives.
void check_left_out(const TensorChecks& check, const ColumnLists& columns, size_t kind, int64_t n, int64_t count) {
  const std::string name = of_kind("left_out", kind), of_offsets = of_kind("left_out_offsets", kind);
  const OptionalTensor &left_out = columns.tensor(kind, kLeftOutColumns), &offsets = columns.tensor(kind, kLeftOutOffsets);
  check.that(left_out.has_value() == offsets.has_value(), name.c_str(), "expected columns and offsets or neither");
  if (!left_out || !offsets) return;
  check.that(columns.special(kind) == Special::kPositive && columns.groups(kind) != Groups::kPositives, name.c_str(),
             "expected none but of keys that have one positive a row");
  check(name.c_str(), left_out, ScalarType::Long, {kAny});
  check_range(check, name.c_str(), left_out, 0, count, "indices of columns");
  check(of_offsets.c_str(), offsets, ScalarType::Long, {n + 1});
  const int64_t* x = data<int64_t>(offsets);
  check.that(x[0] == 0 && x[n] == left_out->size(0) && std::is_sorted(x, x + n + 1), of_offsets.c_str(),
             "expected offsets that rise from 0 to ", left_out->size(0));
}

void check_columns(const TensorChecks& check, const ColumnLists& columns, size_t kind, ScalarType type, int64_t n, int64_t d) {
  const auto name = [&](const char* field) { return of_kind(field, kind); };
  check.that(columns.tensor(kind, kVectors).has_value(), name("vectors").c_str(), "expected a tensor, got none");
  check(name("vectors").c_str(), columns.vectors(kind), type, {kAny, d});
  const int64_t count = columns.vectors(kind).size(0);
  const Special special = columns.special(kind);
  check.that(kind ? special == Special::kNothing || special == Special::kOwnNegative : special == Special::kPositive,
             name("special").c_str(), "expected ", kind ? "0 or 2" : "1", ", got ", columns.number(kind, kSpecial));
  const OptionalTensor& place = columns.tensor(kind, kSpecialColumn);
  check(name("special_column").c_str(), place, ScalarType::Long, {n});
  check_range(check, name("special_column").c_str(), place, 0, count, "indices of columns");
  check.that(special == Special::kNothing || place || n <= count, name("vectors").c_str(), "expected at least ", n,
             " rows, one for each query, or a special column for each, got ", count);
  const Groups groups = columns.groups(kind);
  check.that(groups >= Groups::kOrdinary, name("groups").c_str(), "expected 0 to 2, got ", columns.number(kind, kGroups));
  const OptionalTensor& group = columns.tensor(kind, kGroup);
  const OptionalTensor& query_group = columns.tensor(kind, kQueryGroup);
  check(name("group").c_str(), group, ScalarType::Long, {count, kAny});
  check.that(query_group.has_value() == group.has_value(), name("group").c_str(), "expected groups of queries and columns or neither");
  if (group) check(name("query_group").c_str(), query_group, ScalarType::Long, {n, group->size(1)});
  check.that(groups != Groups::kPositives || !group || group->size(1) == 1, name("group").c_str(),
             "expected one relation where it makes positives, got ", group ? group->size(1) : 0);
  check.that(groups == Groups::kOrdinary || group, name("group").c_str(), "expected a tensor, got none");
  check_left_out(check, columns, kind, n, count);
}

void check_arguments(const Arguments& a) {
  const TensorChecks check("info_nce", a.query);
  const ScalarType type = sum_type(check, "query", a.query);
  const int64_t n = a.query.size(0), d = a.query.size(1);
  check("query", a.query, type, {n, d});
  check.that(n > 0 && d > 0, "query", "expected at least one row and one dimension, got ", n, " and ", d);
  check.that(a.columns.are_whole(), "columns", "expected ", int(kNumTensorRules), " tensors and ", int(kNumNumberRules),
             " numbers for each kind, of which there is at least one");
  int num_own = 0;
  for (size_t kind = 0; kind < a.columns.count(); ++kind) {
    check_columns(check, a.columns, kind, type, n, d);
    num_own += a.columns.special(kind) == Special::kOwnNegative;
  }
  check.that(num_own <= 1, "special", "expected own negatives of one kind at most, got ", num_own);
  check("extra_logits", a.extra_logits, type, {n, kAny});
  check("loss_grad", a.loss_grad, type, {n});
  check("limit", a.limit, type, {n});
  check("negative_grad", a.negative_grad, type, {n});
  check("positive_grad", a.positive_grad, type, {n});
  check.that(a.negative_grad.has_value() == a.positive_grad.has_value(), "negative_grad, positive_grad",
             "expected both or neither, got one");
  const int64_t m = a.columns.vectors(0).size(0);
  if (a.symmetric) {
    check.that(n == m, "symmetric", "expected as many queries as keys, got ", n, " and ", m);
    const double infinity = std::numeric_limits<double>::infinity();
    check.that(!a.limit && std::min(a.false_negative_margin, a.false_negative_ratio) == infinity, "symmetric",
               "expected no limit");
    check.that(!a.columns.tensor(0, kSpecialColumn) && a.columns.count() == 1 && !a.extra_logits && !a.mixed_pairs &&
                   !a.negative_grad && a.columns.groups(0) != Groups::kPositives && !a.columns.tensor(0, kLeftOutColumns),
               "symmetric", "expected no target, negatives, bank, extra logits, mixing, weights or several positives");
  }
  if (!a.mixed_pairs) return;
  check.that(!a.columns.tensor(0, kLeftOutColumns), "mixed_pairs", "expected none with a list of columns that are left out");
  check.that(0 < a.k && a.k <= m, "k", "expected 1 to ", m, ", got ", a.k);
  check("mixed_pairs", a.mixed_pairs, ScalarType::Long, {n, kAny, 2});
  check_range(check, "mixed_pairs", a.mixed_pairs, 0, a.k, "places among the k");
}

template <typename T>
void compute(const Problem<T>& problem, const Results<T>& out, int64_t block_bytes) {
  const int64_t n = problem.query.rows;
  const Prepared<T> prepared(problem);
  const RowBlocks blocks(n, prepared.row_stride() * int64_t(sizeof(T)), block_bytes, prepared.most_block_rows());
  LogitBlock<T> block(prepared, blocks);
  std::vector<double> moment(n, 0.0);  // each row's part of scale · ∂loss/∂scale
  (problem.symmetric ? both_directions<T> : one_direction<T>)(prepared, blocks, block, out, moment);
  finish_column_gradients(prepared, block);
  if (out.scale_gradient) *out.scale_gradient = T(std::accumulate(moment.begin(), moment.end(), 0.0) / problem.scale);
  *out.total = T(problem.common_weight * std::accumulate(out.loss, out.loss + n, 0.0));
}

// The results' tensors; one that isn't wanted is empty.
template <typename T>
struct ResultTensors {
  explicit ResultTensors(const Arguments& a) {
    const int64_t n = a.query.size(0), d = a.query.size(1), m = a.columns.vectors(0).size(0);
    const auto matrix = [](bool is_wanted, int64_t rows, int64_t columns) {
      return is_wanted ? new_tensor<T>({rows, columns}) : new_tensor<T>({0});
    };
    loss = new_tensor<T>({n}), positive = new_tensor<T>({n}), hardest = new_tensor<T>({n});
    negative_lse = new_tensor<T>({n}), column_lse = new_tensor<T>({a.symmetric ? m : 0}), total = new_tensor<T>({});
    query_gradient = matrix(a.wants_query, n, d);
    extra_gradient = matrix(a.wants_extra_logits, n, a.extra_logits ? a.extra_logits->size(1) : 0);
    scale_gradient = a.wants_scale ? new_tensor<T>({}) : new_tensor<T>({0});
    for (size_t kind = 0; kind < a.columns.count(); ++kind)
      column_gradients.push_back(matrix(a.columns.wants_gradient(kind), a.columns.vectors(kind).size(0), d));
    hard_negatives = new_tensor<int64_t>({a.mixed_pairs ? n : 0, a.mixed_pairs ? a.k : 0});
  }

  Results<T> results(const Arguments& a) {
    Results<T> out;
    out.loss = data<T>(loss), out.positive = data<T>(positive), out.hardest = data<T>(hardest);
    out.negative_lse = data<T>(negative_lse), out.column_lse = data<T>(column_lse), out.total = data<T>(total);
    if (a.wants_query) out.query_gradient = data<T>(query_gradient);
    if (a.wants_extra_logits) out.extra_gradient = data<T>(extra_gradient);
    if (a.wants_scale) out.scale_gradient = data<T>(scale_gradient);
    return out;
  }
  Result in_order() const {
    return {loss,           negative_lse,     column_lse,     positive,       hardest,       total,
            query_gradient, column_gradients, extra_gradient, scale_gradient, hard_negatives};
  }

  Tensor loss, negative_lse, column_lse, positive, hardest, total, query_gradient, extra_gradient, scale_gradient;
  Tensors column_gradients;
  Tensor hard_negatives;
};

template <typename T>
Problem<T> problem_of(const Arguments& a, ResultTensors<T>& tensors) {
  const int64_t n = a.query.size(0), d = a.query.size(1);
  Problem<T> problem;
  problem.query = {a.query.const_data_ptr<T>(), n, d, d};
  problem.columns = columns_of<T>(a.columns, tensors.column_gradients);
  problem.extra_logits = data<T>(a.extra_logits);
  problem.num_extra = a.extra_logits ? a.extra_logits->size(1) : 0;
  if (a.mixed_pairs)
    problem.mixing = {data<int64_t>(a.mixed_pairs), data<int64_t>(tensors.hard_negatives), a.mixed_pairs->size(1), a.k,
                      a.alpha};
  problem.scale = a.scale, problem.margin = a.margin, problem.symmetric = a.symmetric;
  problem.limits = {data<T>(a.limit), a.false_negative_margin, a.false_negative_ratio};
  problem.common_weight = a.row_weight, problem.row_weight = data<T>(a.loss_grad);
  problem.negative_weight = data<T>(a.negative_grad), problem.positive_weight = data<T>(a.positive_grad);
  return problem;
}

template <typename T>
Result run(const Arguments& a, int64_t block_bytes) {
  ResultTensors<T> tensors(a);
  compute(problem_of(a, tensors), tensors.results(a), block_bytes);
  return tensors.in_order();
}

Result info_nce(const Tensor& query, OptionalTensors column_tensors, std::vector<double> column_numbers,
                const OptionalTensor& extra_logits, const OptionalTensor& loss_grad, const OptionalTensor& negative_grad,
                const OptionalTensor& positive_grad, const OptionalTensor& limit, double false_negative_margin,
                double false_negative_ratio, double row_weight, double scale, double margin, bool symmetric, const OptionalTensor& mixed_pairs, int64_t k, double alpha, bool wants_query,
                bool wants_extra_logits, bool wants_scale, int64_t block_bytes) {
  const Arguments arguments{
      query,
      {column_tensors, column_numbers},
      extra_logits, loss_grad, negative_grad, positive_grad, limit, mixed_pairs, false_negative_margin, false_negative_ratio, row_weight, scale, margin, symmetric, k, alpha,
      wants_query, wants_extra_logits, wants_scale};
  check_arguments(arguments);
  return (query.scalar_type() == ScalarType::Double ? run<double> : run<float>)(arguments, block_bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "info_nce(Tensor query, Tensor?[] column_tensors, float[] column_numbers, Tensor? extra_logits, Tensor? loss_grad, "
      "Tensor? negative_grad, Tensor? positive_grad, Tensor? limit, float false_negative_margin, "
      "float false_negative_ratio, float row_weight, float scale, float margin, bool symmetric, Tensor? mixed_pairs, int k, float alpha, "
      "bool wants_query, bool wants_extra_logits, bool wants_scale, int block_bytes=134217728) -> "
      "(Tensor loss, Tensor negative_lse, Tensor column_lse, Tensor positive, Tensor hardest, Tensor total, "
      "Tensor query_grad, Tensor[] column_grads, Tensor extra_logits_grad, Tensor scale_grad, Tensor hard_negatives)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) { m.impl("info_nce", TORCH_BOX(&info_nce)); }

}  // namespace hicl
