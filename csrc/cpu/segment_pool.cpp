// Ragged weighted pooling: H_b = Σ_j w_bj h_bj / Σ_j w_bj. One pass over the segments each way.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

template <typename T>
struct Sequences {
  const int64_t* offsets;
  const T* weights;  // null: all ones
  T weight(int64_t j) const { return weights ? weights[j] : T(1); }
  // 1 / Σ_j w_bj, and 0 where the weights sum to zero
  T inverse_total(int64_t b) const {
    double total = 0;
    for (int64_t j = offsets[b]; j < offsets[b + 1]; ++j) total += double(weight(j));
    return total == 0 ? T(0) : T(1 / total);
  }
};

// Calls f(b, 1 / Σ w) for every sequence, sequences shared out among threads.
template <typename T, typename F>
void each_sequence(const Sequences<T>& s, int64_t num_sequences, int64_t num_segments, int64_t d, F f) {
  const int64_t mean_elements = std::max<int64_t>(1, num_segments * d / num_sequences);
  torch::stable::parallel_for(0, num_sequences, rows_per_thread(mean_elements), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b, s.inverse_total(b));
  });
}

template <typename T>
Tensor forward(const Tensor& segments, const Tensor& offsets, const OptionalTensor& weights) {
  const int64_t num_sequences = offsets.size(0) - 1, d = segments.size(1);
  const Sequences<T> s{offsets.const_data_ptr<int64_t>(), data<T>(weights)};
  Tensor pooled = new_tensor<T>({num_sequences, d});
  const T* h = segments.const_data_ptr<T>();
  T* out = data<T>(pooled);
  const RowKernels<T>& k = row_kernels<T>();
  each_sequence(s, num_sequences, segments.size(0), d, [&](int64_t b, T inverse_total) {
    T* row = out + b * d;
    int64_t j = s.offsets[b];
    k.scale(h + j * d, s.weight(j) * inverse_total, row, d);
    for (++j; j < s.offsets[b + 1]; ++j) k.add_scaled(h + j * d, s.weight(j) * inverse_total, row, d);
  });
  return pooled;
}

// ∂/∂h_j = w_j / W_b · g_b and ∂/∂w_j = g_b · (h_j − H_b) / W_b
template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& segments, const Tensor& offsets, const OptionalTensor& weights,
                                    const Tensor& pooled_grad, bool want_segments, bool want_weights) {
  const int64_t num_sequences = offsets.size(0) - 1, num_segments = segments.size(0), d = segments.size(1);
  const Sequences<T> s{offsets.const_data_ptr<int64_t>(), data<T>(weights)};
  Tensor segments_grad = want_segments ? new_tensor<T>({num_segments, d}) : new_tensor<T>({0});
  Tensor weights_grad = new_tensor<T>({want_weights ? num_segments : 0});
  const T *h = segments.const_data_ptr<T>(), *g = pooled_grad.const_data_ptr<T>();
  T *dh = want_segments ? data<T>(segments_grad) : nullptr, *dw = want_weights ? data<T>(weights_grad) : nullptr;
  const RowKernels<T>& k = row_kernels<T>();
  each_sequence(s, num_sequences, num_segments, d, [&](int64_t b, T inverse_total) {
    const int64_t first = s.offsets[b], last = s.offsets[b + 1];
    const T* grad = g + b * d;
    if (dh)
      for (int64_t j = first; j < last; ++j) k.scale(grad, s.weight(j) * inverse_total, dh + j * d, d);
    if (dw) {
      double mean = 0;  // g_b · H_b
      for (int64_t j = first; j < last; ++j) {
        dw[j] = k.dot(grad, h + j * d, d);
        mean += double(s.weight(j) * inverse_total) * double(dw[j]);
      }
      for (int64_t j = first; j < last; ++j) dw[j] = T(double(dw[j]) - mean) * inverse_total;
    }
  });
  return {segments_grad, weights_grad};
}

TensorChecks check_sequences(const char* op, const Tensor& segments, const Tensor& offsets, const OptionalTensor& weights) {
  const TensorChecks check(op, segments);
  const ScalarType type = sum_type(check, "segments", segments);
  const int64_t num_segments = segments.size(0), d = segments.size(1);
  check("segments", segments, type, {num_segments, d});
  check("offsets", offsets, ScalarType::Long, {kAny});
  check("weights", weights, type, {num_segments});
  const int64_t num_sequences = offsets.size(0) - 1;
  check.that(num_sequences > 0, "offsets", "expected at least 2 elements, got ", num_sequences + 1);
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  check.that(offset[0] == 0, "offsets", "expected to start at 0, got ", offset[0]);
  bool is_rising = true;
  for (int64_t b = 0; b < num_sequences; ++b) is_rising &= offset[b] < offset[b + 1];
  check.that(is_rising, "offsets", "expected at least one segment in every sequence, got an empty one");
  check.that(offset[num_sequences] == num_segments, "offsets", "expected to end at the number of segments, ",
             num_segments, ", got ", offset[num_sequences]);
  return check;
}

Tensor segment_pool(const Tensor& segments, const Tensor& offsets, const OptionalTensor& weights) {
  check_sequences("segment_pool", segments, offsets, weights);
  const auto typed = segments.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return typed(segments, offsets, weights);
}

std::tuple<Tensor, Tensor> segment_pool_backward(const Tensor& segments, const Tensor& offsets,
                                                 const OptionalTensor& weights, const Tensor& pooled_grad,
                                                 bool want_segments, bool want_weights) {
  const TensorChecks check = check_sequences("segment_pool_backward", segments, offsets, weights);
  check("pooled_grad", pooled_grad, segments.scalar_type(), {offsets.size(0) - 1, segments.size(1)});
  const auto typed = segments.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return typed(segments, offsets, weights, pooled_grad, want_segments, want_weights);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def("segment_pool(Tensor segments, Tensor offsets, Tensor? weights) -> Tensor");
  m.def(
      "segment_pool_backward(Tensor segments, Tensor offsets, Tensor? weights, Tensor pooled_grad, bool want_segments, "
      "bool want_weights) -> (Tensor segments_grad, Tensor weights_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) {
  m.impl("segment_pool", TORCH_BOX(&segment_pool));
  m.impl("segment_pool_backward", TORCH_BOX(&segment_pool_backward));
}

}  // namespace hicl
