#include "dispatch.cuh"
#include "info_nce.cuh"

namespace hicl::cuda {

int launch_similarities(const SmallInfoNCE& p, void* stream) {
  return for_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const int64_t blocks = int64_t(tiles_of(p.num_rows)) * p.num_sums();
    return launch(similarity_kernel<T>, blocks, kTileThreads, kCosineShared<T>, stream, p);
  });
}

int launch_gradients(const SmallInfoNCE& p, void* stream) {
  return for_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch(gradient_kernel<T>, gradient_blocks(p), kTileThreads, sizeof(GradientMemory<T>), stream, p);
  });
}

}  // namespace hicl::cuda
