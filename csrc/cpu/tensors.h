// Small conveniences over the stable ABI's tensors.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "matmul.h"

namespace hicl {

using OptionalTensor = std::optional<Tensor>;

template <typename T>
Tensor new_tensor(std::initializer_list<int64_t> shape) {
  return torch::stable::empty(shape, kScalarType<T>, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}
template <typename T>
T* data(Tensor& t) {
  return t.mutable_data_ptr<T>();
}
template <typename T>
const T* data(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace hicl
