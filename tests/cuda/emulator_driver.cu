// Small kernels, right and wrong ones, that show what the emulator finds.
#include "platform.cuh"

namespace hicl::cuda {
namespace {

// out[i] = in[63 − i], through shared memory; wrong without the barrier.
template <bool kHasBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  if constexpr (kHasBarrier) __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

// Half the threads wait at the barrier for the other half.
__global__ void divergent_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void overrun_kernel() { dynamic_shared<float>()[threadIdx.x + 1] = 0.0f; }

// Wrong where the copies are not waited for.
template <bool kWaits>
__global__ void copy_kernel(const float* in, float* out) {
  float* mine = dynamic_shared<float>() + 4 * threadIdx.x;
  copy_async(mine, in + 4 * threadIdx.x, threadIdx.x == 1 ? 8 : 16);
  commit_copies();
  if constexpr (kWaits) wait_for_copies<0>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = mine[i];
}

__global__ void warp_kernel(const float* in, float* sum, unsigned* positive) {
  sum[threadIdx.x] = warp_sum(in[threadIdx.x]);
  positive[threadIdx.x] = __ballot_sync(kAllLanes, in[threadIdx.x] > 0);
}

}  // namespace

#define HICL_EXPORT extern "C" __attribute__((visibility("default")))

HICL_EXPORT int reverse(const float* in, float* out, int has_barrier) {
  return launch(has_barrier ? reverse_kernel<true> : reverse_kernel<false>, 1, 64, 256, nullptr, in, out);
}
HICL_EXPORT int divergent() { return launch(divergent_kernel, 1, 64, 0, nullptr); }
HICL_EXPORT int overrun() { return launch(overrun_kernel, 1, 64, 256, nullptr); }
HICL_EXPORT int copy(const float* in, float* out, int waits) {
  return launch(waits ? copy_kernel<true> : copy_kernel<false>, 1, 2, 32, nullptr, in, out);
}
HICL_EXPORT int warp(const float* in, float* sum, unsigned* positive) {
  return launch(warp_kernel, 1, 32, 0, nullptr, in, sum, positive);
}
HICL_EXPORT const char* describe(int error) { return error_name(error); }
HICL_EXPORT uint16_t to_bfloat16(float x) { return rounded<__nv_bfloat16>(x).bits; }
HICL_EXPORT uint16_t to_float16(float x) { return rounded<__half>(x).bits; }
HICL_EXPORT float of_float16(uint16_t bits) { return to_float(__half{bits}); }

}  // namespace hicl::cuda
