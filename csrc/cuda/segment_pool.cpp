// Operators of ragged weighted pooling over segment_pool.cu's launchers.
#include "segment_pool.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace hicl::cuda {
namespace {

TensorChecks check_sequences(const char* op, const Tensor& segments, const Tensor& offsets, const OptionalTensor& weights) {
  const TensorChecks check(op, segments);
  check("segments", segments, operand_type(check, "segments", segments), {kAny, kAny});
  check("offsets", offsets, ScalarType::Long, {kAny});
  check.that(offsets.size(0) > 1, "offsets", "expected at least 2 elements, got ", offsets.size(0));
  check("weights", weights, ScalarType::Float, {segments.size(0)});
  return check;
}

Ragged describe(const Tensor& segments, const Tensor& offsets, const OptionalTensor& weights) {
  const int64_t num_segments = segments.size(0), dim = segments.size(1);
  return {offsets.const_data_ptr<int64_t>(), floats(weights), offsets.size(0) - 1,    num_segments, dim,
          chunk_for(num_segments, dim),      element_type(segments), has_aligned_rows(segments)};
}

struct Pooled {
  Tensor pooled, inverse_total;
};

// Rows of `values`, (S, D) as `ragged` says, or none of them.
Pooled pool(const Ragged& ragged, const void* values, const Tensor& like, ScalarType type, void* stream) {
  const int64_t dim = ragged.dim;
  Pooled result{new_tensor(like, {ragged.num_sequences, dim}, type),
                new_tensor(like, {ragged.num_sequences}, ScalarType::Float)};
  Tensor part = new_tensor(like, {ragged.num_chunks(), 2, dim}, ScalarType::Float);
  Tensor part_weight = new_tensor(like, {ragged.num_chunks(), 2}, ScalarType::Float);
  const PoolBuffers buffers{values, result.pooled.mutable_data_ptr(), floats(result.inverse_total), floats(part),
                            floats(part_weight)};
  check_launch(launch_pool(ragged, buffers, stream), "segment_pool");
  return result;
}

// segments (S, D), offsets (B + 1,), weights (S,) float32 -> (B, D) in the segments' type
Tensor segment_pool(const Tensor& segments, const Tensor& offsets, const OptionalTensor& weights) {
  check_sequences("segment_pool", segments, offsets, weights);
  const OnDevice device(segments);
  const Ragged ragged = describe(segments, offsets, weights);
  return pool(ragged, segments.const_data_ptr(), segments, segments.scalar_type(), device.stream()).pooled;
}

// -> segments' gradient (S, D) in the segments' type, weights' (S,) float32; empty where not wanted
std::tuple<Tensor, Tensor> segment_pool_backward(const Tensor& segments, const Tensor& offsets,
                                                 const OptionalTensor& weights, const Tensor& pooled_grad,
                                                 bool want_segments, bool want_weights) {
  check_sequences("segment_pool_backward", segments, offsets, weights)(
      "pooled_grad", pooled_grad, segments.scalar_type(), {offsets.size(0) - 1, segments.size(1)});
  const OnDevice device(segments);
  Ragged ragged = describe(segments, offsets, weights);
  ragged.is_aligned = ragged.is_aligned && has_aligned_rows(pooled_grad);
  Tensor dot = new_tensor(segments, {want_weights ? ragged.num_segments : 0}, ScalarType::Float);
  if (want_weights)
    check_launch(launch_segment_dots(ragged, segments.const_data_ptr(), pooled_grad.const_data_ptr(), floats(dot),
                                     device.stream()),
                 "segment_pool_backward");

  // The dots are pooled like segments of one dimension; without them the weights alone are summed.
  Ragged of_dots = ragged;
  of_dots.dim = want_weights ? 1 : 0, of_dots.type = ElementType::kFloat32, of_dots.is_aligned = false;
  Pooled sums = pool(of_dots, want_weights ? dot.const_data_ptr() : nullptr, segments, ScalarType::Float, device.stream());

  Tensor segments_grad =
      new_tensor(segments, {want_segments ? ragged.num_segments : 0, ragged.dim}, segments.scalar_type());
  Tensor weights_grad = new_tensor(segments, {want_weights ? ragged.num_segments : 0}, ScalarType::Float);
  const SpreadBuffers buffers{pooled_grad.const_data_ptr(),
                              floats(sums.inverse_total),
                              want_weights ? floats(dot) : nullptr,
                              want_weights ? floats(sums.pooled) : nullptr,
                              want_segments ? segments_grad.mutable_data_ptr() : nullptr,
                              want_weights ? floats(weights_grad) : nullptr};
  check_launch(launch_spread(ragged, buffers, device.stream()), "segment_pool_backward");
  return {segments_grad, weights_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cuda, m) {
  m.def("segment_pool(Tensor segments, Tensor offsets, Tensor? weights) -> Tensor");
  m.def(
      "segment_pool_backward(Tensor segments, Tensor offsets, Tensor? weights, Tensor pooled_grad, bool want_segments, "
      "bool want_weights) -> (Tensor segments_grad, Tensor weights_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cuda, HICL_CUDA_KEY, m) {
  m.impl("segment_pool", TORCH_BOX(&segment_pool));
  m.impl("segment_pool_backward", TORCH_BOX(&segment_pool_backward));
}

}  // namespace hicl::cuda
