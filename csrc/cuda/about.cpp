// What the CUDA part of this build can tell of itself.
#include <torch/csrc/stable/library.h>

#include <string>

#if !defined(HICL_CUDA_BUILD)
#define HICL_CUDA_BUILD "emulated"
#endif

namespace hicl::cuda {
namespace {

// nvcc's release, then what there is code for: machine code of sm_80 and so on, PTX of compute_80.
std::string compiled() { return HICL_CUDA_BUILD; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cuda, m) { m.def("compiled() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cuda, CompositeExplicitAutograd, m) { m.impl("compiled", TORCH_BOX(&compiled)); }

}  // namespace hicl::cuda
