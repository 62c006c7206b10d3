// The operator of hard negatives over hard_negatives.cu's launcher.
#include "hard_negatives.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "tensors.h"

namespace hicl::cuda {
namespace {

// query (N, D), key (M, D), target (N,), query_group (N,), key_group (M,) -> similarity (N, k) float32, index (N, k) int64
std::tuple<Tensor, Tensor> hard_negatives(const Tensor& query, const Tensor& key, int64_t k,
                                          const OptionalTensor& target, const OptionalTensor& query_group,
                                          const OptionalTensor& key_group, bool exclude_target) {
  const TensorChecks check("hard_negatives", query);
  const ScalarType type = operand_type(check, "query", query);
  const int64_t n = query.size(0), dim = query.size(1);
  check("query", query, type, {n, dim});
  check("key", key, type, {kAny, dim});
  const int64_t m = key.size(0);
  check("target", target, ScalarType::Long, {n});
  check.groups(query_group, n, key_group, m);
  check.that(k > 0, "k", "expected at least 1, got ", k);
  STD_TORCH_CHECK(std::max({n, m, dim, k}) <= kMostRows, "hicl_fast: hard_negatives takes at most ", kMostRows,
                  " rows, keys and dimensions");
  const OnDevice device(query);
  Tensor similarity = new_tensor(query, {n, k}, ScalarType::Float);
  Tensor index = new_tensor(query, {n, k}, ScalarType::Long);

  HardNegatives problem{};
  problem.query = query.const_data_ptr(), problem.key = key.const_data_ptr();
  problem.target = indices(target);
  problem.query_group = indices(query_group), problem.key_group = indices(key_group);
  problem.num_rows = int(n), problem.num_keys = int(m), problem.dim = int(dim), problem.k = int(k);
  problem.type = element_type(query);
  problem.is_aligned = has_aligned_rows(query) && has_aligned_rows(key);
  problem.leaves_out_target = exclude_target;
  Tensor cosine = new_tensor(query, {kColumnTile * tiles_of(int(n)), problem.cosine_stride()}, ScalarType::Float);
  problem.cosine = floats(cosine);
  problem.similarity = floats(similarity), problem.index = index.mutable_data_ptr<int64_t>();
  check_launch(launch_hard_negatives(problem, device.stream()), "hard_negatives");
  return {similarity, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cuda, m) {
  m.def(
      "hard_negatives(Tensor query, Tensor key, int k, Tensor? target, Tensor? query_group, Tensor? key_group, "
      "bool exclude_target) -> (Tensor similarity, Tensor index)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cuda, HICL_CUDA_KEY, m) { m.impl("hard_negatives", TORCH_BOX(&hard_negatives)); }

}  // namespace hicl::cuda
