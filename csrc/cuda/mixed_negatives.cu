#include "dispatch.cuh"
#include "mixed_negatives.cuh"

namespace hicl::cuda {

int launch_mixtures(const MixedNegatives& p, void* stream) {
  return for_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch(mixture_kernel<T>, p.num_rows, kTileThreads, MixtureMemory<T>::bytes(p.k), stream, p);
  });
}

int launch_mixture_gradients(const MixedNegatives& p, const MixtureGradients& g, void* stream) {
  const int error = for_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch(mixture_gradient_kernel<T>, g.count, kTileThreads, MixtureGradientMemory<T>::bytes(p.k), stream, p, g);
  });
  if (error || !g.bank_grad || p.num_bank == 0) return error;
  return launch(join_additions_kernel, int64_t(p.num_bank) * join_slices(p.dim), kTileThreads, kJoinShared, stream, p, g);
}

}  // namespace hicl::cuda
