// The stream that PyTorch's work on a device goes to.
//
// libtorch_cuda has the function; it is looked up when first needed, so that one binary loads on a PyTorch without CUDA
// too. (A weak reference would stay null: a linker given a CPU-only PyTorch leaves out the library that leads there.)
#pragma once
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace hicl::cuda {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

inline GetStream find_get_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<GetStream>(dlsym(library ? library : RTLD_DEFAULT, kName));
}

inline void* current_stream(int32_t device) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream != nullptr, "hicl_fast: this PyTorch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "hicl_fast: cannot get the current CUDA stream of device ", device);
  return stream;
}

}  // namespace hicl::cuda
