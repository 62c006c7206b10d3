#include "dispatch.cuh"
#include "hard_negatives.cuh"

namespace hicl::cuda {
namespace {

constexpr int kFewPerLane = 8, kMostPerLane = kMostRows / kWarp;

}  // namespace

int launch_hard_negatives(const HardNegatives& p, void* stream) {
  const int error = for_type(p.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return launch(cosine_kernel<T>, int64_t(tiles_of(p.num_rows)) * tiles_of(p.num_keys), kTileThreads, kCosineShared<T>,
                  stream, p);
  });
  if (error) return error;
  const auto select = p.num_keys <= kFewPerLane * kWarp ? select_kernel<kFewPerLane> : select_kernel<kMostPerLane>;
  return launch(select, (p.num_rows + kRowsPerBlock - 1) / kRowsPerBlock, kSelectThreads, 0, stream, p);
}

}  // namespace hicl::cuda
