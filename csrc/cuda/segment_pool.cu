#include "dispatch.cuh"
#include "segment_pool.cuh"

namespace hicl::cuda {
namespace {

constexpr int kWarpsPerBlock = kPoolThreads / kWarp;

int64_t blocks_of(int64_t num_warps) { return (num_warps + kWarpsPerBlock - 1) / kWarpsPerBlock; }

template <typename T, bool kAligned>
int pool(const Ragged& r, const PoolBuffers& buffers, void* stream) {
  const int64_t slices = num_slices<T>(r.dim), blocks = blocks_of(r.num_chunks() * slices);
  const int error = launch(pool_kernel<T, kAligned>, blocks, kPoolThreads, 0, stream, r, buffers, slices);
  if (error || r.num_chunks() == 1) return error;
  return launch(join_kernel<T, kAligned>, blocks, kPoolThreads, 0, stream, r, buffers, slices);
}

}  // namespace

int launch_pool(const Ragged& r, const PoolBuffers& buffers, void* stream) {
  return for_type(r.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    return r.is_aligned ? pool<T, true>(r, buffers, stream) : pool<T, false>(r, buffers, stream);
  });
}

int launch_segment_dots(const Ragged& r, const void* segments, const void* pooled_grad, float* dot, void* stream) {
  return for_type(r.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto kernel = r.is_aligned ? segment_dots_kernel<T, true> : segment_dots_kernel<T, false>;
    return launch(kernel, blocks_of(r.num_chunks()), kPoolThreads, 0, stream, r, static_cast<const T*>(segments),
                  static_cast<const T*>(pooled_grad), dot);
  });
}

int launch_spread(const Ragged& r, const SpreadBuffers& buffers, void* stream) {
  return for_type(r.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto kernel = r.is_aligned ? spread_kernel<T, true> : spread_kernel<T, false>;
    const int64_t slices = num_slices<T>(r.dim);
    return launch(kernel, blocks_of(r.num_chunks() * slices), kPoolThreads, 0, stream, r, buffers, slices);
  });
}

const char* describe_error(int error) { return error_name(error); }

}  // namespace hicl::cuda
