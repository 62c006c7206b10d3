// The element types that the kernels take; no CUDA and no PyTorch in here.
#pragma once

namespace hicl::cuda {

enum class ElementType : int { kFloat32, kBFloat16, kFloat16 };

// What an error code of a launch means.
const char* describe_error(int error);

}  // namespace hicl::cuda
