// Matrix products of PyTorch's BLAS on raw memory, without the dispatcher.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>

#include "sanitizer.h"

extern "C" {
AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2);
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                        AtenTensorHandle mat2, double beta, double alpha);
}

namespace hicl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType kScalarType = std::is_same_v<T, int64_t>  ? ScalarType::Long
                                   : std::is_same_v<T, double> ? ScalarType::Double
                                                               : ScalarType::Float;

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  T* row(int64_t i) const { return data + i * row_stride; }
};

template <typename T>
Tensor as_tensor(const Matrix<T>& m) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(m.data), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  kScalarType<std::remove_const_t<T>>);
}

// Nothing in itself; with a sanitizer, that all of a matrix lies where it may.
template <typename T>
void check_extent(const Matrix<T>& m) {
  if (!kSanitizing) return;
  const Matrix<T> by_row = m.column_stride == 1 ? m : m.transposed();
  for (int64_t i = 0; i < by_row.rows; ++i) must_be_mine(by_row.row(i), by_row.columns * int64_t(sizeof(T)));
}

// out = a b, or out += a b
template <typename T, typename A, typename B>
void matmul(const Matrix<T>& out, const Matrix<A>& a, const Matrix<B>& b, bool accumulate = false) {
  check_extent(out), check_extent(a), check_extent(b);
  const Tensor o = as_tensor(out), x = as_tensor(a), y = as_tensor(b);
  const AOTITorchError error = accumulate ? aoti_torch_cpu_addmm_out(o.get(), o.get(), x.get(), y.get(), 1.0, 1.0)
                                          : aoti_torch_cpu_mm_out(o.get(), x.get(), y.get());
  STD_TORCH_CHECK(error == 0, "hicl_fast: a matrix product of shape ", a.rows, " x ", a.columns, " x ", b.columns,
                  " failed");
}

}  // namespace hicl
