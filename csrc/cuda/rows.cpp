// Operators of what InfoNCE's large-batch path does row by row, over rows.cu's launchers.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace hicl::cuda {
namespace {

// A matrix that a kernel takes as it is.
TensorChecks check_rows(const char* op, const char* name, const Tensor& x) {
  const TensorChecks check(op, x);
  check(name, x, operand_type(check, name, x), {kAny, kAny});
  return check;
}

RowShape describe(const Tensor& x, bool are_others_aligned) {
  return {x.size(0), x.size(1), element_type(x), has_aligned_rows(x) && are_others_aligned};
}

// x (N, D), unit (N, D) to be written in x's type -> (N,) float32: 1 / max(‖x‖, floor), 0 for a zero row
Tensor normalise_rows(const Tensor& x, double floor, const OptionalTensor& unit) {
  check_rows("normalise_rows", "x", x)("unit", unit, x.scalar_type(), {x.size(0), x.size(1)});
  const OnDevice device(x);
  Tensor inverse = new_tensor(x, {x.size(0)}, ScalarType::Float);
  const NormaliseBuffers buffers{x.const_data_ptr(), floats(inverse), unit ? unit->mutable_data_ptr() : nullptr,
                                 float(floor)};
  check_launch(launch_normalise(describe(x, !unit || has_aligned_rows(*unit)), buffers, device.stream()),
               "normalise_rows");
  return inverse;
}

// x (N, D), factor (N,) float32 -> factor · x in x's type
Tensor scale_rows(const Tensor& x, const Tensor& factor) {
  check_rows("scale_rows", "x", x)("factor", factor, ScalarType::Float, {x.size(0)});
  const OnDevice device(x);
  Tensor scaled = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  check_launch(launch_scale_rows(describe(x, true), x.const_data_ptr(), factor.const_data_ptr<float>(),
                                 scaled.mutable_data_ptr(), device.stream()),
               "scale_rows");
  return scaled;
}

// query (N, D), key (M, D), their inverse norms float32, target (N,) -> (N,) float32 cosines
Tensor positive_similarity(const Tensor& query, const Tensor& query_inverse, const Tensor& key,
                           const Tensor& key_inverse, const Tensor& target) {
  const TensorChecks check = check_rows("positive_similarity", "query", query);
  check("query_inverse", query_inverse, ScalarType::Float, {query.size(0)});
  check("key", key, query.scalar_type(), {kAny, query.size(1)});
  check("key_inverse", key_inverse, ScalarType::Float, {key.size(0)});
  check("target", target, ScalarType::Long, {query.size(0)});
  const OnDevice device(query);
  Tensor positive = new_tensor(query, {query.size(0)}, ScalarType::Float);
  const OtherRows keys{key.const_data_ptr(), key_inverse.const_data_ptr<float>(), key.size(0)};
  const PositiveBuffers buffers{query.const_data_ptr(), query_inverse.const_data_ptr<float>(), keys,
                                target.const_data_ptr<int64_t>(), floats(positive)};
  check_launch(launch_positive(describe(query, has_aligned_rows(key)), buffers, device.stream()),
               "positive_similarity");
  return positive;
}

// product (N, D) and factor (N,) float32, x (N, D), inverse (N,) float32; other (K, D), its inverse norms (K,) and what
// rows.h says of partners -> gradient (N, D) float32
void norm_gradient(const Tensor& product, const Tensor& factor, const Tensor& x, const Tensor& inverse, double floor,
                   const OptionalTensor& other, const OptionalTensor& other_inverse, const OptionalTensor& coefficient,
                   const OptionalTensor& partner, const OptionalTensor& begin, const Tensor& gradient) {
  const TensorChecks check = check_rows("norm_gradient", "x", x);
  const int64_t n = x.size(0), dim = x.size(1), num_others = other ? other->size(0) : 0;
  check("product", product, ScalarType::Float, {n, dim});
  check.of_any("factor", factor, {ScalarType::Float}, {n});
  check("inverse", inverse, ScalarType::Float, {n});
  check("other", other, x.scalar_type(), {kAny, dim});
  check("other_inverse", other_inverse, ScalarType::Float, {num_others});
  check("coefficient", coefficient, ScalarType::Float, {begin ? num_others : n});
  check("partner", partner, ScalarType::Long, {begin ? num_others : n});
  check("begin", begin, ScalarType::Long, {n + 1});
  check.that(!coefficient || (other && other_inverse), "other", "expected rows and their inverse norms beside coefficients");
  check.that(!begin || partner, "partner", "expected a tensor beside begin, got none");
  check("gradient", gradient, ScalarType::Float, {n, dim});
  const OnDevice device(x);
  const OtherRows others{other ? other->const_data_ptr() : nullptr, floats(other_inverse), other ? other->size(0) : 0};
  const NormGradientBuffers buffers{product.const_data_ptr<float>(), factor.const_data_ptr<float>(), factor.stride(0),
                                    x.const_data_ptr(), inverse.const_data_ptr<float>(), float(floor), others,
                                    floats(coefficient), indices(partner), indices(begin),
                                    gradient.mutable_data_ptr<float>()};
  const bool are_aligned =
      has_aligned_rows(product) && has_aligned_rows(gradient) && (!other || has_aligned_rows(*other));
  check_launch(launch_norm_gradient(describe(x, are_aligned), buffers, device.stream()), "norm_gradient");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cuda, m) {
  m.def("normalise_rows(Tensor x, float floor, Tensor(a!)? unit) -> Tensor");
  m.def("scale_rows(Tensor x, Tensor factor) -> Tensor");
  m.def(
      "positive_similarity(Tensor query, Tensor query_inverse, Tensor key, Tensor key_inverse, Tensor target) -> Tensor");
  m.def(
      "norm_gradient(Tensor product, Tensor factor, Tensor x, Tensor inverse, float floor, Tensor? other, "
      "Tensor? other_inverse, Tensor? coefficient, Tensor? partner, Tensor? begin, Tensor(a!) gradient) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cuda, HICL_CUDA_KEY, m) {
  m.impl("normalise_rows", TORCH_BOX(&normalise_rows));
  m.impl("scale_rows", TORCH_BOX(&scale_rows));
  m.impl("positive_similarity", TORCH_BOX(&positive_similarity));
  m.impl("norm_gradient", TORCH_BOX(&norm_gradient));
}

}  // namespace hicl::cuda
