// A 64 × 64 tile of a matrix product by 128 threads, operands in shared memory: matrix instructions for 16-bit types,
// fused multiply-adds for float32, which is never rounded to TF32. Sums are float32.
#pragma once
#include "platform.cuh"

namespace hicl::cuda {

constexpr int kTile = 64;
constexpr int kTileThreads = 128;

// How many elements deep one step of a product goes: 128 bytes.
template <typename T>
constexpr int kDepth = 128 / int(sizeof(T));

// Rows in shared memory are 16 bytes longer than their contents: eight rows' same column are then in different banks.
template <typename T>
constexpr int kPadding = Vector<T>::kSize;

// The first `count` elements of 16 bytes of a row, zeros beyond them. Where rows are aligned they arrive with the group of
// copies that they are committed in, all or none of them; `somewhere` is an address that can be read.
template <typename T>
__device__ __forceinline__ void load_vector(T* to, const T* from, int count, const T* somewhere, bool is_aligned) {
  if (is_aligned) {
    copy_async(to, count > 0 ? from : somewhere, count > 0 ? 16 : 0);
  } else {
#pragma unroll
    for (int v = 0; v < Vector<T>::kSize; ++v) to[v] = v < count ? from[v] : rounded<T>(0.0f);
  }
}

// kRows × kWidth elements of a matrix in shared memory, zeros beyond its edges.
template <typename T, int kRows, int kWidth>
struct Block {
  static constexpr int kStride = kWidth + kPadding<T>, kSize = kRows * kStride;

  // Rows and columns from (row, column) on of a matrix (rows, columns). Arrives with the group of copies it is committed in.
  __device__ __forceinline__ static void load(T* to, const T* matrix, int rows, int columns, int row, int column,
                                              bool is_aligned) {
    constexpr int kPerRow = kWidth / Vector<T>::kSize;
    for (int i = threadIdx.x; i < kRows * kPerRow; i += kTileThreads) {
      const int r = row + i / kPerRow, c = column + i % kPerRow * Vector<T>::kSize;
      T* place = to + i / kPerRow * kStride + i % kPerRow * Vector<T>::kSize;
      load_vector(place, matrix + int64_t(r) * columns + c, r < rows ? columns - c : 0, matrix, is_aligned);
    }
  }
};

__device__ __forceinline__ uint32_t pair_at(const void* two_elements) {
  return *static_cast<const uint32_t*>(two_elements);
}
template <typename T>
__device__ __forceinline__ uint32_t pair_of(const T* low, const T* high) {
  return uint32_t(*reinterpret_cast<const uint16_t*>(low)) | uint32_t(*reinterpret_cast<const uint16_t*>(high)) << 16;
}

// tile(i, j) += Σ_k A(i, k) · B(k, j). A lies by rows of kDepth; B by columns of kDepth, or by rows of 64.
// A thread has kCount elements of the tile; element e is at (row(e), column(e)).
template <typename T>
class TileProduct {
 public:
  static constexpr int kCount = 32;

  template <bool kByColumns>
  __device__ __forceinline__ void add(const T* a, const T* b) {
    constexpr int kA = Block<T, kTile, kDepth<T>>::kStride, kB = kByColumns ? kA : Block<T, kDepth<T>, kTile>::kStride;
    const int k_of_lane = 2 * (lane() % 4);
#pragma unroll
    for (int step = 0; step < kDepth<T>; step += 16) {
      const int k = step + k_of_lane;
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const T* upper = a + (first_row() + 16 * m + lane() / 4) * kA + k;
        const T* lower = upper + 8 * kA;
        left[m][0] = pair_at(upper), left[m][1] = pair_at(lower);
        left[m][2] = pair_at(upper + 8), left[m][3] = pair_at(lower + 8);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int j = first_column() + 8 * n + lane() / 4;
        uint32_t right[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = k + 8 * h;
          right[h] = kByColumns ? pair_at(b + j * kB + at) : pair_of(b + at * kB + j, b + (at + 1) * kB + j);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add<T>(sum_[m][n], left[m], right);
      }
    }
  }
  __device__ __forceinline__ float at(int e) const { return sum_[e / 16][e / 4 % 4][e % 4]; }
  __device__ __forceinline__ static int row(int e) {
    return first_row() + 16 * (e / 16) + 8 * (e % 4 / 2) + lane() / 4;
  }
  __device__ __forceinline__ static int column(int e) {
    return first_column() + 8 * (e / 4 % 4) + 2 * (lane() % 4) + e % 2;
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarp; }
  // Two by two warps, 32 × 32 elements each.
  __device__ __forceinline__ static int first_row() { return threadIdx.x / (2 * kWarp) * 32; }
  __device__ __forceinline__ static int first_column() { return threadIdx.x / kWarp % 2 * 32; }

  float sum_[2][4][4] = {};
};

template <>
class TileProduct<float> {
 public:
  static constexpr int kCount = 32;

  template <bool kByColumns>
  __device__ __forceinline__ void add(const float* a, const float* b) {
    constexpr int kA = Block<float, kTile, kDepth<float>>::kStride;
    constexpr int kB = kByColumns ? kA : Block<float, kDepth<float>, kTile>::kStride;
    // A step's sum is taken apart and then added: two short chains of roundings, where one over all of D would be long.
    float step[kCount] = {};
#pragma unroll 4
    for (int k = 0; k < kDepth<float>; ++k) {
      float right[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) right[n] = kByColumns ? b[column(n) * kB + k] : b[k * kB + column(n)];
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        const float left = a[row(4 * m) * kA + k];
#pragma unroll
        for (int n = 0; n < 4; ++n) step[4 * m + n] += left * right[n];
      }
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum_[e] += step[e];
  }
  __device__ __forceinline__ float at(int e) const { return sum_[e]; }
  __device__ __forceinline__ static int row(int e) { return threadIdx.x / 16 + 8 * (e / 4); }
  __device__ __forceinline__ static int column(int e) { return threadIdx.x % 16 + 16 * (e % 4); }

 private:
  float sum_[kCount] = {};
};

// --- over the 128 threads; every thread gets the result --------------------------------------------------------------

template <typename Combine>
__device__ __forceinline__ float block_combine(float of_warp, float* scratch, Combine combine) {
  __syncthreads();  // whoever read scratch before has done
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  float result = scratch[0];
#pragma unroll
  for (int w = 1; w < kTileThreads / kWarp; ++w) result = combine(result, scratch[w]);
  return result;
}
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  return block_combine(warp_sum(x), scratch, [](float a, float b) { return a + b; });
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
  return block_combine(warp_max(x), scratch, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace hicl::cuda
