// What a row is multiplied by to be a unit vector.
#pragma once
#include "../constants.h"
#include "platform.cuh"

namespace hicl::cuda {

constexpr float kNormFloor = float(hicl::kNormFloor);

// 1 / max(‖x‖, floor) of ‖x‖², 0 for a zero row. A norm that is infinite or NaN makes NaN of everything that it touches.
__device__ __forceinline__ float inverse_of_norm(float squares, float floor = kNormFloor) {
  const float norm = sqrtf(squares);
  return norm == 0.0f ? 0.0f : 1.0f / fmaxf(norm, floor) + (norm - norm);
}

// Whether a row is shorter than the floor and so divided by a constant: its inverse is 1 / floor, give or take a rounding.
__device__ __forceinline__ bool has_constant_norm(float inverse, float floor = kNormFloor) { return inverse * floor > 0.999999f; }

}  // namespace hicl::cuda
