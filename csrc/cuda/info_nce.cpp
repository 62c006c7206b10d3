// The operator of InfoNCE for small batches over info_nce.cu's launchers.
#include "info_nce.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "tensors.h"

namespace hicl::cuda {
namespace {

struct Wanted {
  bool query, key, negatives, extra_logits, scale;
  explicit Wanted(int64_t bits)
      : query(bits & 1), key(bits & 2), negatives(bits & 4), extra_logits(bits & 8), scale(bits & 16) {}
};

// query (N, D), key (M, D), target (N,), negatives (P, D), extra_logits (N, E) float32, query_group (N,) and
// key_group (M,), both or neither, loss_grad (N,) float32, negative_grad and positive_grad (N,) float32, both or neither,
// scale_on_device () float32; wanted: bits of query, key, negatives, extra logits, scale
//   -> loss, negative_lse, positive, hardest (N,), total (), gradients, empty where not wanted, scale's (): all float32
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Outputs small_info_nce(const Tensor& query, const Tensor& key, const OptionalTensor& target,
                       const OptionalTensor& negatives, const OptionalTensor& extra_logits,
                       const OptionalTensor& query_group, const OptionalTensor& key_group,
                       const OptionalTensor& loss_grad, const OptionalTensor& negative_grad,
                       const OptionalTensor& positive_grad, const OptionalTensor& scale_on_device, double scale,
                       double row_weight, double own_bias, double margin, int64_t wanted_bits) {
  const TensorChecks check("small_info_nce", query);
  const ScalarType type = operand_type(check, "query", query);
  const int64_t n = query.size(0), dim = query.size(1);
  check("query", query, type, {n, dim});
  check("key", key, type, {kAny, dim});
  check("negatives", negatives, type, {kAny, dim});
  check("extra_logits", extra_logits, ScalarType::Float, {n, kAny});
  const int64_t m = key.size(0), p = negatives ? negatives->size(0) : 0, extra = extra_logits ? extra_logits->size(1) : 0;
  check("target", target, ScalarType::Long, {n});
  check.that(target || n <= m, "key", "expected at least ", n, " rows, one for each query, or a target, got ", m);
  check.groups(query_group, n, key_group, m);
  check("loss_grad", loss_grad, ScalarType::Float, {n});
  check("negative_grad", negative_grad, ScalarType::Float, {n});
  check("positive_grad", positive_grad, ScalarType::Float, {n});
  check.that(negative_grad.has_value() == positive_grad.has_value(), "negative_grad, positive_grad",
             "expected both or neither, got one");
  check("scale_on_device", scale_on_device, ScalarType::Float, {});
  STD_TORCH_CHECK(std::max({n, m, p, extra, dim}) <= kMostRows,
                  "hicl_fast: small_info_nce takes at most ", kMostRows, " rows, columns and dimensions");
  const OnDevice device(query);
  const Wanted wanted(wanted_bits);
  const auto floats_of = [&](bool is_wanted, int64_t rows, int64_t columns) {
    return new_tensor(query, {is_wanted ? rows : 0, columns}, ScalarType::Float);
  };
  const auto row_values = [&] { return new_tensor(query, {n}, ScalarType::Float); };
  Tensor loss = row_values(), negative_lse = row_values(), positive = row_values(), hardest = row_values();
  Tensor total = new_tensor(query, {}, ScalarType::Float), scale_grad = new_tensor(query, {}, ScalarType::Float);
  Tensor query_grad = floats_of(wanted.query, n, dim), key_grad = floats_of(wanted.key, m, dim);
  Tensor negatives_grad = floats_of(wanted.negatives, p, dim), extra_grad = floats_of(wanted.extra_logits, n, extra);

  SmallInfoNCE problem{};
  problem.query = query.const_data_ptr(), problem.key = key.const_data_ptr();
  problem.negatives = negatives ? negatives->const_data_ptr() : nullptr;
  problem.extra_logits = floats(extra_logits);
  problem.target = indices(target), problem.loss_grad = floats(loss_grad);
  problem.negative_grad = floats(negative_grad), problem.positive_grad = floats(positive_grad);
  problem.query_group = indices(query_group), problem.key_group = indices(key_group);
  problem.scale_on_device = floats(scale_on_device);
  problem.num_rows = int(n), problem.num_keys = int(m), problem.num_negatives = int(p);
  problem.num_extra = int(extra), problem.dim = int(dim);
  problem.type = element_type(query);
  problem.is_aligned = has_aligned_rows(query) && has_aligned_rows(key) && (!negatives || has_aligned_rows(*negatives));
  problem.scale = float(scale), problem.row_weight = float(row_weight), problem.own_bias = float(own_bias);
  problem.margin_cosine = float(std::cos(margin)), problem.margin_sine = float(std::sin(margin));

  Tensor similarity = floats_of(true, kColumnTile * tiles_of(int(n)), problem.similarity_stride());
  Tensor inverse_norm = floats_of(true, 1, n + m + p);
  Tensor partial = floats_of(true, kNumPartials * problem.num_sums(), n);
  problem.similarity = floats(similarity), problem.inverse_norm = floats(inverse_norm), problem.partial = floats(partial);
  problem.loss = floats(loss), problem.negative_lse = floats(negative_lse);
  problem.positive = floats(positive), problem.hardest = floats(hardest);
  problem.total = floats(total);
  problem.scale_grad = wanted.scale ? floats(scale_grad) : nullptr;
  problem.query_grad = wanted.query ? floats(query_grad) : nullptr;
  problem.key_grad = wanted.key ? floats(key_grad) : nullptr;
  problem.negatives_grad = wanted.negatives && p ? floats(negatives_grad) : nullptr;
  problem.extra_logits_grad = wanted.extra_logits && extra ? floats(extra_grad) : nullptr;

  check_launch(launch_similarities(problem, device.stream()), "info_nce");
  check_launch(launch_gradients(problem, device.stream()), "info_nce");
  return {loss, negative_lse, positive, hardest, total, query_grad, key_grad, negatives_grad, extra_grad, scale_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cuda, m) {
  m.def(
      "small_info_nce(Tensor query, Tensor key, Tensor? target, Tensor? negatives, Tensor? extra_logits, "
      "Tensor? query_group, Tensor? key_group, Tensor? loss_grad, Tensor? negative_grad, Tensor? positive_grad, "
      "Tensor? scale_on_device, float scale, "
      "float row_weight, float own_bias, float margin, int wanted) -> (Tensor loss, Tensor negative_lse, "
      "Tensor positive, Tensor hardest, Tensor total, Tensor query_grad, Tensor key_grad, "
      "Tensor negatives_grad, Tensor extra_logits_grad, Tensor scale_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cuda, HICL_CUDA_KEY, m) { m.impl("small_info_nce", TORCH_BOX(&small_info_nce)); }

}  // namespace hicl::cuda
