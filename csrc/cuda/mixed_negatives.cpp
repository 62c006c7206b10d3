// Operators of hard-negative mixing over mixed_negatives.cu's launchers.
#include "mixed_negatives.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "tensors.h"

namespace hicl::cuda {
namespace {

TensorChecks check_candidates(const char* op, const Tensor& query, const Tensor& bank, const Tensor& index,
                              const Tensor& pairs) {
  const TensorChecks check(op, query);
  const ScalarType type = operand_type(check, "query", query);
  const int64_t n = query.size(0), dim = query.size(1);
  check("query", query, type, {n, dim});
  check("bank", bank, type, {kAny, dim});
  check("index", index, ScalarType::Long, {n, kAny});
  check("pairs", pairs, ScalarType::Long, {n, kAny, 2});
  return check;
}

MixedNegatives describe(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& pairs, double alpha,
                        Tensor& cosine, Tensor& inverse_norm) {
  STD_TORCH_CHECK(index.size(1) <= kMostMixed, "hicl_fast: mixed_negatives takes at most ", kMostMixed,
                  " negatives of a row");
  MixedNegatives problem{};
  problem.query = query.const_data_ptr(), problem.bank = bank.const_data_ptr();
  problem.index = index.const_data_ptr<int64_t>(), problem.pairs = pairs.const_data_ptr<int64_t>();
  problem.num_rows = int(query.size(0)), problem.num_bank = int(bank.size(0)), problem.k = int(index.size(1));
  problem.num_pairs = int(pairs.size(1)), problem.dim = int(query.size(1));
  problem.type = element_type(query);
  problem.is_aligned = has_aligned_rows(query) && has_aligned_rows(bank);
  problem.alpha = float(alpha);
  problem.cosine = floats(cosine), problem.inverse_norm = floats(inverse_norm);
  return problem;
}

// query (N, D), bank (B, D), index (N, k), pairs (N, m, 2) -> cosine, 1 / ‖g‖, (N, m) float32
std::tuple<Tensor, Tensor> mixed_negatives(const Tensor& query, const Tensor& bank, const Tensor& index,
                                           const Tensor& pairs, double alpha) {
  check_candidates("mixed_negatives", query, bank, index, pairs);
  const OnDevice device(query);
  Tensor cosine = new_tensor(query, {pairs.size(0), pairs.size(1)}, ScalarType::Float);
  Tensor inverse_norm = new_tensor(query, {pairs.size(0), pairs.size(1)}, ScalarType::Float);
  const MixedNegatives problem = describe(query, bank, index, pairs, alpha, cosine, inverse_norm);
  check_launch(launch_mixtures(problem, device.stream()), "mixed_negatives");
  return {cosine, inverse_norm};
}

// cosine_grad (N, m) float32 -> gradients of query and bank, float32, empty where not wanted. Rows are taken as many at a
// time as have additions of at most `addition_bytes`.
std::tuple<Tensor, Tensor> mixed_negatives_backward(const Tensor& query, const Tensor& bank, const Tensor& index,
                                                    const Tensor& pairs, double alpha, Tensor cosine,
                                                    Tensor inverse_norm, const Tensor& cosine_grad, bool want_query,
                                                    bool want_bank, int64_t addition_bytes) {
  const TensorChecks check = check_candidates("mixed_negatives_backward", query, bank, index, pairs);
  check("cosine", cosine, ScalarType::Float, {pairs.size(0), pairs.size(1)});
  check("inverse_norm", inverse_norm, ScalarType::Float, {pairs.size(0), pairs.size(1)});
  check("cosine_grad", cosine_grad, ScalarType::Float, {pairs.size(0), pairs.size(1)});
  const OnDevice device(query);
  const MixedNegatives problem = describe(query, bank, index, pairs, alpha, cosine, inverse_norm);
  const int64_t n = problem.num_rows, dim = problem.dim, row_bytes = problem.k * dim * int64_t(sizeof(float));
  const int64_t fitting = addition_bytes / std::max<int64_t>(row_bytes, 1);
  const int64_t step = want_bank ? std::max<int64_t>(1, std::min(fitting, n)) : n;
  Tensor query_grad = new_tensor(query, {want_query ? n : 0, dim}, ScalarType::Float);
  Tensor bank_grad = new_tensor(query, {want_bank ? bank.size(0) : 0, dim}, ScalarType::Float);
  Tensor addition = new_tensor(query, {want_bank ? step : 0, problem.k, dim}, ScalarType::Float);

  MixtureGradients gradients{};
  gradients.cosine_grad = cosine_grad.const_data_ptr<float>();
  gradients.addition = want_bank ? floats(addition) : nullptr;
  gradients.query_grad = want_query ? floats(query_grad) : nullptr;
  gradients.bank_grad = want_bank ? floats(bank_grad) : nullptr;
  for (int64_t first = 0; first < n; first += step) {
    gradients.first = int(first), gradients.count = int(std::min(step, n - first));
    check_launch(launch_mixture_gradients(problem, gradients, device.stream()), "mixed_negatives_backward");
  }
  return {query_grad, bank_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cuda, m) {
  m.def(
      "mixed_negatives(Tensor query, Tensor bank, Tensor index, Tensor pairs, float alpha) -> "
      "(Tensor cosine, Tensor inverse_norm)");
  m.def(
      "mixed_negatives_backward(Tensor query, Tensor bank, Tensor index, Tensor pairs, float alpha, Tensor cosine, "
      "Tensor inverse_norm, Tensor cosine_grad, bool want_query, bool want_bank, int addition_bytes) -> "
      "(Tensor query_grad, Tensor bank_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cuda, HICL_CUDA_KEY, m) {
  m.impl("mixed_negatives", TORCH_BOX(&mixed_negatives));
  m.impl("mixed_negatives_backward", TORCH_BOX(&mixed_negatives_backward));
}

}  // namespace hicl::cuda
