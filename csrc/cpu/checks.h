// What the CPU's operators check beyond shapes and types: the numbers that memory is indexed by.
#pragma once
#include "../tensor_checks.h"

#include <algorithm>
#include <cstdint>
#include <optional>

#include "tensors.h"

namespace hicl {

// The type of the sums, which a call's matrices are of.
inline ScalarType sum_type(const TensorChecks& check, const char* name, const Tensor& t) {
  check.of_any(name, t, {ScalarType::Float, ScalarType::Double}, {kAny, kAny});
  return t.scalar_type();
}

// low ≤ x < end for all of them. `what` they are, for the message.
inline void check_range(const TensorChecks& check, const char* name, const Tensor& indices, int64_t low, int64_t end,
                        const char* what) {
  const int64_t *x = indices.const_data_ptr<int64_t>(), count = indices.numel();
  bool is_outside = false;  // no branch: most of the time all are looked at
  for (int64_t i = 0; i < count; ++i) is_outside |= (x[i] < low) | (x[i] >= end);
  if (!is_outside) return;
  const auto [least, most] = std::minmax_element(x, x + count);
  check.that(false, name, "expected ", what, ", ", low, " to ", end - 1, ", got values from ", *least, " to ", *most);
}
inline void check_range(const TensorChecks& check, const char* name, const OptionalTensor& indices, int64_t low,
                        int64_t end, const char* what) {
  if (indices) check_range(check, name, *indices, low, end, what);
}

}  // namespace hicl
