// Each query's own columns, ragged: log Σ_h e^(ℓ_ih) over rows offsets[i] to offsets[i + 1], 6 H D operations both ways.
// A query's rows are read from memory once each way: norms, products and gradients are taken while they are in cache.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

template <typename T>
constexpr T kLeftOut = -std::numeric_limits<T>::infinity();

template <typename T>
struct Own {
  Matrix<const T> query{};           // (N, D)
  const T* rows = nullptr;           // (H, D)
  const int64_t* offsets = nullptr;  // (N + 1,)
  const T* limit = nullptr;          // (N,) or null
  const int64_t *query_group = nullptr, *group = nullptr;  // (N, G), (H, G) or null
  int64_t num_rows = 0, num_relations = 0;
  double scale = 1, hardness = 0;

  bool is_of_group(int64_t i, int64_t h) const {
    if (!group) return false;
    const int64_t *of_query = query_group + i * num_relations, *of_row = group + h * num_relations;
    for (int64_t g = 0; g < num_relations; ++g)
      if (of_query[g] == of_row[g]) return true;
    return false;
  }
};

// One of a query's rows: as it is multiplied, 1 / its length, and its similarity, −∞ where a rule leaves it out.
template <typename T>
struct Column {
  const T* row;
  T factor, shrink, similarity;
  bool has_constant_norm;
};

// A vector that others are multiplied by: where it is too long for that, a shorter copy of it, which `scratch` holds.
template <typename T>
Column<T> made_ready(const T* row, int64_t d, T* scratch) {
  const Length<T> measured = length(row, d);
  if (measured.shrink != 1) row_kernels<T>().scale(row, measured.shrink, scratch, d), row = scratch;
  return {row, unit_factor<T>(measured.norm), measured.shrink, T(0), has_constant_norm(measured.norm)};
}

// A thread's query with its columns, one query after the other.
template <typename T>
class Query {
 public:
  explicit Query(const Own<T>& own) : own_(own), unit_(own.query.columns), shorter_(own.query.columns), scratch_(own.query.columns) {}

  void take(int64_t i) {
    i_ = i;
    const int64_t d = own_.query.columns;
    query_ = made_ready(own_.query.row(i), d, shorter_.data());
    row_kernels<T>().scale(query_.row, query_.factor, unit_.data(), d);
  }
  const Column<T>& self() const { return query_; }
  const T* unit() const { return unit_.data(); }

  // What it returns is good until the next call.
  Column<T> column(int64_t h) {
    const int64_t d = own_.query.columns;
    Column<T> found = with_similarity(own_.rows + h * d, d);
    const bool is_left_out = (own_.limit && found.similarity > own_.limit[i_]) || own_.is_of_group(i_, h);
    if (is_left_out) found.similarity = kLeftOut<T>;
    return found;
  }

 private:
  // Length and product from one pass over the row, where its length needs no more than its square.
  Column<T> with_similarity(const T* row, int64_t d) {
    const T* factors[] = {row, unit_.data()};
    T products[2];
    row_kernels<T>().dots(row, factors, 2, products, d);
    if (d >= kFewDimensions && products[0] >= Squares<T>::kLeast && products[0] < Squares<T>::kMost) {
      const double norm = std::sqrt(double(products[0]));
      const T factor = unit_factor<T>(norm);
      return {row, factor, T(1), products[1] * factor, has_constant_norm(norm)};
    }
    Column<T> found = made_ready(row, d, scratch_.data());
    found.similarity = row_kernels<T>().dot(unit_.data(), found.row, d) * found.factor;
    return found;
  }

  const Own<T>& own_;
  int64_t i_ = 0;
  Column<T> query_{};
  std::vector<T> unit_, shorter_, scratch_;  // (D,) each
};

// f(query, i) for every query, shared out among threads.
template <typename T, typename F>
void each_query(const Own<T>& own, F f) {
  const int64_t n = own.query.rows, mean_elements = (own.num_rows / n + 1) * own.query.columns;
  torch::stable::parallel_for(0, n, rows_per_thread(mean_elements), [&](int64_t begin, int64_t end) {
    Query<T> query(own);
    for (int64_t i = begin; i < end; ++i) query.take(i), f(query, i);
  });
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Own<T>& own) {
  Tensor lse = new_tensor<T>({own.query.rows}), hardest = new_tensor<T>({own.query.rows});
  T *out = data<T>(lse), *largest = data<T>(hardest);
  each_query(own, [&](Query<T>& query, int64_t i) {
    double best = kLeftOut<double>, total = 0;
    T most = kLeftOut<T>;
    for (int64_t h = own.offsets[i]; h < own.offsets[i + 1]; ++h) {
      const T similarity = query.column(h).similarity;
      most = std::max(most, similarity);
      if (similarity == kLeftOut<T>) continue;
      const double logit = double(similarity) * (own.scale + own.hardness);
      if (logit > best) total *= std::exp(best - logit), best = logit;
      total += std::exp(logit - (best == kLeftOut<double> ? 0 : best));  // of NaN, NaN
    }
    out[i] = total == 0 ? kLeftOut<T> : T((best == kLeftOut<double> ? 0 : best) + std::log(total));
    largest[i] = most;
  });
  return {lse, hardest};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Own<T>& own, const T* lse, const T* lse_grad, bool wants_query, bool wants_rows,
                                            bool wants_scale) {
  const int64_t n = own.query.rows, d = own.query.columns;
  const auto matrix = [&](bool is_wanted, int64_t rows) { return is_wanted ? new_tensor<T>({rows, d}) : new_tensor<T>({0}); };
  Tensor query_grad = matrix(wants_query, n), rows_grad = matrix(wants_rows, own.num_rows);
  Tensor scale_grad = wants_scale ? new_tensor<T>({}) : new_tensor<T>({0});
  T *dq = wants_query ? data<T>(query_grad) : nullptr, *dx = wants_rows ? data<T>(rows_grad) : nullptr;
  std::vector<double> of_scale(n, 0.0);
  const RowKernels<T>& k = row_kernels<T>();
  each_query(own, [&](Query<T>& query, int64_t i) {
    if (dq) std::fill_n(dq + i * d, d, T(0));
    double along = 0;  // q̂ · ∂/∂q̂
    for (int64_t h = own.offsets[i]; h < own.offsets[i + 1]; ++h) {
      const Column<T> column = query.column(h);
      const double s = double(column.similarity);
      const bool is_left_out = column.similarity == kLeftOut<T>;
      const double weight =
          is_left_out || lse_grad[i] == 0 ? 0.0 : double(lse_grad[i]) * std::exp(s * (own.scale + own.hardness) - double(lse[i]));
      const double slope = weight * own.scale;  // by the similarity
      if (!is_left_out) of_scale[i] += weight * s, along += slope * s;
      if (dq && slope != 0) k.add_scaled(column.row, T(slope * double(column.factor)), dq + i * d, d);
      if (!dx) continue;
      T* gradient = dx + h * d;
      if (is_left_out) {
        std::fill_n(gradient, d, T(0));
        continue;
      }
      const double factor = slope * double(column.factor), radial = column.has_constant_norm ? 0.0 : -factor * s * double(column.factor);
      k.sum_of_two(gradient, T(factor), query.unit(), T(radial), column.row, d);
      if (column.shrink != 1) k.scale(gradient, column.shrink, gradient, d);
    }
    if (!dq) return;
    const Column<T>& self = query.self();
    T* gradient = dq + i * d;
    k.add_scaled(query.unit(), T(self.has_constant_norm ? 0.0 : -along), gradient, d);
    k.scale(gradient, self.factor, gradient, d);
    if (self.shrink != 1) k.scale(gradient, self.shrink, gradient, d);
  });
  if (wants_scale) {
    double total = 0;
    for (const double of_query : of_scale) total += of_query;
    *data<T>(scale_grad) = T(total);
  }
  return {query_grad, rows_grad, scale_grad};
}

void check_own(const TensorChecks& check, const Tensor& query, const Tensor& rows, const Tensor& offsets,
               const OptionalTensor& limit, const OptionalTensor& query_group, const OptionalTensor& group) {
  const ScalarType type = sum_type(check, "query", query);
  const int64_t n = query.size(0), d = query.size(1);
  check("query", query, type, {n, d});
  check.that(n > 0 && d > 0, "query", "expected at least one row and one dimension, got ", n, " and ", d);
  check("rows", rows, type, {kAny, d});
  const int64_t num_rows = rows.size(0);
  check("offsets", offsets, ScalarType::Long, {n + 1});
  check("limit", limit, type, {n});
  check("group", group, ScalarType::Long, {num_rows, kAny});
  check.that(query_group.has_value() == group.has_value(), "group", "expected groups of queries and columns or neither");
  if (group) check("query_group", query_group, ScalarType::Long, {n, group->size(1)});
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  bool is_rising = offset[0] == 0 && offset[n] == num_rows;
  for (int64_t i = 0; i < n; ++i) is_rising &= offset[i] <= offset[i + 1];
  check.that(is_rising, "offsets", "expected rising numbers from 0 to ", num_rows, ", the number of rows");
}

template <typename T>
Own<T> own_of(const Tensor& query, const Tensor& rows, const Tensor& offsets, const OptionalTensor& limit,
              const OptionalTensor& query_group, const OptionalTensor& group, double scale, double hardness) {
  Own<T> own;
  own.query = {query.const_data_ptr<T>(), query.size(0), query.size(1), query.size(1)};
  own.rows = rows.const_data_ptr<T>(), own.num_rows = rows.size(0), own.offsets = offsets.const_data_ptr<int64_t>();
  own.limit = data<T>(limit), own.query_group = data<int64_t>(query_group), own.group = data<int64_t>(group);
  own.num_relations = group ? group->size(1) : 0;
  own.scale = scale, own.hardness = hardness;
  return own;
}

std::tuple<Tensor, Tensor> own_log_sum_exp(const Tensor& query, const Tensor& rows, const Tensor& offsets,
                                           const OptionalTensor& limit, const OptionalTensor& query_group,
                                           const OptionalTensor& group, double scale, double hardness) {
  check_own(TensorChecks("own_log_sum_exp", query), query, rows, offsets, limit, query_group, group);
  if (query.scalar_type() == ScalarType::Double)
    return forward(own_of<double>(query, rows, offsets, limit, query_group, group, scale, hardness));
  return forward(own_of<float>(query, rows, offsets, limit, query_group, group, scale, hardness));
}

std::tuple<Tensor, Tensor, Tensor> own_log_sum_exp_backward(const Tensor& query, const Tensor& rows, const Tensor& offsets,
                                                            const OptionalTensor& limit, const OptionalTensor& query_group,
                                                            const OptionalTensor& group, double scale, double hardness,
                                                            const Tensor& lse, const Tensor& lse_grad, bool wants_query,
                                                            bool wants_rows, bool wants_scale) {
  const TensorChecks check("own_log_sum_exp_backward", query);
  check_own(check, query, rows, offsets, limit, query_group, group);
  check("lse", lse, query.scalar_type(), {query.size(0)});
  check("lse_grad", lse_grad, query.scalar_type(), {query.size(0)});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward(own_of<T>(query, rows, offsets, limit, query_group, group, scale, hardness), lse.const_data_ptr<T>(),
                    lse_grad.const_data_ptr<T>(), wants_query, wants_rows, wants_scale);
  };
  return query.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "own_log_sum_exp(Tensor query, Tensor rows, Tensor offsets, Tensor? limit, Tensor? query_group, Tensor? group, "
      "float scale, float hardness) -> (Tensor lse, Tensor hardest)");
  m.def(
      "own_log_sum_exp_backward(Tensor query, Tensor rows, Tensor offsets, Tensor? limit, Tensor? query_group, "
      "Tensor? group, float scale, float hardness, Tensor lse, Tensor lse_grad, bool wants_query, bool wants_rows, "
      "bool wants_scale) -> (Tensor query_grad, Tensor rows_grad, Tensor scale_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) {
  m.impl("own_log_sum_exp", TORCH_BOX(&own_log_sum_exp));
  m.impl("own_log_sum_exp_backward", TORCH_BOX(&own_log_sum_exp_backward));
}

}  // namespace hicl
