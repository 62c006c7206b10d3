// The gradient paradigm's two passes over N×D numbers: both views to unit rows with their positives, and a gradient's terms
// added up and taken back through the norm. Each reads and writes every number once; what is in between stays in cache.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "groups.h"
#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

using Views = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Views run_views(const Tensor& u, const Tensor& v) {
  const int64_t n = u.size(0), d = u.size(1);
  Tensor unit_u = new_tensor<T>({n, d}), unit_v = new_tensor<T>({n, d});
  Tensor u_factor = new_tensor<T>({n}), v_factor = new_tensor<T>({n}), positive = new_tensor<T>({n});
  const T* from[] = {u.const_data_ptr<T>(), v.const_data_ptr<T>()};
  T* to[] = {data<T>(unit_u), data<T>(unit_v)};
  T* factor[] = {data<T>(u_factor), data<T>(v_factor)};
  T* similarity = data<T>(positive);
  const RowKernels<T>& k = row_kernels<T>();
  torch::stable::parallel_for(0, n, rows_per_thread(2 * d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int view = 0; view < 2; ++view) {
        const T* row = from[view] + i * d;
        T* unit = to[view] + i * d;
        const auto [norm, shrink] = length(row, d);
        if (shrink != 1) k.scale(row, shrink, unit, d), row = unit;
        k.scale(row, unit_factor<T>(norm), unit, d);
        factor[view][i] = unit_factor<T>(norm) * shrink;
      }
      similarity[i] = k.dot(to[0] + i * d, to[1] + i * d, d);
    }
  });
  return {unit_u, unit_v, u_factor, v_factor, positive};
}

// factor_j · rows[source_j], a part of the gradient of row target_j; j where there is no source or target.
template <typename T>
class Term {
 public:
  Term(const Tensor& rows, const Tensor& factor, const OptionalTensor& source, const OptionalTensor& target)
      : rows_(rows.const_data_ptr<T>()), d_(rows.size(1)), factor_(factor.const_data_ptr<T>()), source_(data<int64_t>(source)) {
    if (target) by_target_.emplace(data<int64_t>(target), target->size(0));
  }

  // Calls f(row, factor) for each part of row i's gradient.
  template <typename F>
  void each(int64_t i, F f) const {
    const auto part = [&](int64_t j) { f(rows_ + (source_ ? source_[j] : j) * d_, factor_[j]); };
    if (!by_target_) return part(i);
    for (const int64_t j : by_target_->of(i)) part(j);
  }

 private:
  const T* rows_;
  int64_t d_;
  const T* factor_;
  const int64_t* source_;
  std::optional<GroupIndex> by_target_;
};

// A row's parts, a few at a time.
template <typename T>
class Sum {
 public:
  Sum(T* out, int64_t d) : out_(out), d_(d) { std::fill(out, out + d, T(0)); }
  void add(const T* row, T factor) {
    if (count_ == kMost) flush();
    row_[count_] = row, factor_[count_++] = factor;
  }
  void flush() {
    row_kernels<T>().add_rows(out_, row_, factor_, count_, 0, d_);
    count_ = 0;
  }

 private:
  static constexpr int64_t kMost = 8;
  T* out_;
  int64_t d_, count_ = 0;
  const T* row_[kMost];
  T factor_[kMost];
};

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

template <typename T>
Tensor run_gradient(const Tensor& unit, const Tensor& unit_factors, const Tensors& rows, const Tensors& factors,
                    const OptionalTensors& sources, const OptionalTensors& targets) {
  const int64_t n = unit.size(0), d = unit.size(1);
  Tensor gradients = new_tensor<T>({n, d});
  T* out = data<T>(gradients);
  const T *x = unit.const_data_ptr<T>(), *factor = unit_factors.const_data_ptr<T>();
  std::vector<Term<T>> terms;
  for (size_t t = 0; t < rows.size(); ++t) terms.emplace_back(rows[t], factors[t], sources[t], targets[t]);
  const RowKernels<T>& k = row_kernels<T>();
  torch::stable::parallel_for(0, n, rows_per_thread(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* gradient = out + i * d;
      Sum<T> sum(gradient, d);
      for (const Term<T>& term : terms) term.each(i, [&](const T* row, T factor) { sum.add(row, factor); });
      sum.flush();
      const T along = factor[i] >= T(1 / kNormFloor) ? T(0) : k.dot(x + i * d, gradient, d);  // a constant, for short rows
      k.combine(gradient, factor[i], -along * factor[i], x + i * d, T(0), x + i * d, d);
    }
  });
  return gradients;
}

void check_terms(const Tensor& unit, const Tensor& unit_factor, const Tensors& rows, const Tensors& factors,
                 const OptionalTensors& sources, const OptionalTensors& targets) {
  const TensorChecks check("paradigm_gradient", unit);
  const ScalarType type = sum_type(check, "unit", unit);
  const int64_t n = unit.size(0), d = unit.size(1);
  check("unit", unit, type, {n, d});
  check("unit_factor", unit_factor, type, {n});
  check.that(factors.size() == rows.size() && sources.size() == rows.size() && targets.size() == rows.size(), "rows",
             "expected as many as factors, sources and targets, got ", rows.size(), " with ", factors.size(), ", ",
             sources.size(), " and ", targets.size());
  for (size_t t = 0; t < rows.size(); ++t) {
    check("rows", rows[t], type, {sources[t] ? kAny : n, d});
    check("factors", factors[t], type, {n});
    check("sources", sources[t], ScalarType::Long, {n});
    check_range(check, "sources", sources[t], 0, rows[t].size(0), "indices of rows");
    check("targets", targets[t], ScalarType::Long, {n});
  }
}

Views views(const Tensor& u, const Tensor& v) {
  const TensorChecks check("paradigm_views", u);
  const ScalarType type = sum_type(check, "u", u);
  check("u", u, type, {u.size(0), u.size(1)});
  check("v", v, type, {u.size(0), u.size(1)});
  return (u.scalar_type() == ScalarType::Double ? run_views<double> : run_views<float>)(u, v);
}
Tensor gradient(const Tensor& unit, const Tensor& unit_factor, Tensors rows, Tensors factors, OptionalTensors sources,
                OptionalTensors targets) {
  check_terms(unit, unit_factor, rows, factors, sources, targets);
  const auto run = unit.scalar_type() == ScalarType::Double ? run_gradient<double> : run_gradient<float>;
  return run(unit, unit_factor, rows, factors, sources, targets);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "paradigm_views(Tensor u, Tensor v) -> "
      "(Tensor unit_u, Tensor unit_v, Tensor u_factor, Tensor v_factor, Tensor positive)");
  m.def(
      "paradigm_gradient(Tensor unit, Tensor unit_factor, Tensor[] rows, Tensor[] factors, Tensor?[] sources, Tensor?[] targets) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) {
  m.impl("paradigm_views", TORCH_BOX(&views));
  m.impl("paradigm_gradient", TORCH_BOX(&gradient));
}

}  // namespace hicl
