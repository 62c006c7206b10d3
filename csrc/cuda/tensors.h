// Small conveniences over the stable ABI's tensors on a CUDA device; on the CPU, where the kernels are emulated.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "../tensor_checks.h"
#include "stream.h"
#include "types.h"

namespace hicl::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes a tensor's device the current one, and knows its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) {
    if (!x.is_cuda()) return;
    guard_.emplace(x.get_device_index());
    stream_ = current_stream(x.get_device_index());
  }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}
inline float* floats(Tensor& t) { return t.mutable_data_ptr<float>(); }
inline const float* floats(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }
inline const int64_t* indices(const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

// The type of a call's matrices.
inline ScalarType operand_type(const TensorChecks& check, const char* name, const Tensor& t) {
  check.of_any(name, t, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, {kAny, kAny});
  return t.scalar_type();
}

inline ElementType element_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return ElementType::kFloat32;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    default: STD_TORCH_CHECK(false, "hicl_fast: expected float32, bfloat16 or float16");
  }
}

// Whether every row of a contiguous matrix begins at a multiple of 16 bytes.
inline bool has_aligned_rows(const Tensor& t) {
  constexpr int64_t kBytes = 16;
  const int64_t row_bytes = t.size(1) * (t.scalar_type() == ScalarType::Float ? 4 : 2);
  return row_bytes % kBytes == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kBytes == 0;
}

inline void check_launch(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, "hicl_fast: ", what, " failed on the device: ", describe_error(error));
}

}  // namespace hicl::cuda

// Which dispatch key the operators are registered for: the emulation's tests say CPU.
#if !defined(HICL_CUDA_KEY)
#define HICL_CUDA_KEY CUDA
#endif
