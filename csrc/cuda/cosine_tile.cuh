// A 64 × 64 tile of cosines: the product of rows as they are, and their norms, which are summed as the rows pass.
//
// Every element is summed in the same order, wherever it lies in its tile: equal rows give cosines that are equal in
// every bit.
#pragma once
#include "norm.cuh"
#include "tile_product.cuh"

namespace hicl::cuda {

constexpr int kCosineStages = 4;

// Σ_k a_k b_k over kDepth<T> elements that begin at multiples of 16 bytes.
template <typename T>
__device__ __forceinline__ float dot_of(const T* a, const T* b) {
  float sum[4] = {};
#pragma unroll
  for (int k = 0; k < kDepth<T>; k += Vector<T>::kSize) {
    const Vector<T> x = *reinterpret_cast<const Vector<T>*>(a + k), y = *reinterpret_cast<const Vector<T>*>(b + k);
#pragma unroll
    for (int v = 0; v < Vector<T>::kSize; ++v) sum[v % 4] += to_float(x.element[v]) * to_float(y.element[v]);
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Rows and columns of a matrix of cosines: the rows of two matrices of `dim` columns each.
template <typename T>
struct Operands {
  const T *rows, *columns;
  int num_rows, num_columns, dim;
  bool is_aligned;  // every row begins at a multiple of 16 bytes
};

// What a block leaves in shared memory, zeros beyond the operands' edges.
struct CosineTile {
  static constexpr int kStride = kTile + 1;
  const float* inverse;  // (2 · kTile,) 1 / max(‖x‖, 10⁻¹²), 0 for a zero row: the rows', then the columns'
  float* cosine;         // (kTile, kTile), rows kStride apart

  __device__ __forceinline__ float& at(int row, int column) const { return cosine[row * kStride + column]; }
};

template <typename T>
constexpr size_t kCosineShared = kCosineStages * 2 * sizeof(T) * Block<T, kTile, kDepth<T>>::kSize;

// By 128 threads, all of which may read the result. Takes kCosineShared<T> bytes of shared memory.
template <typename T>
__device__ __forceinline__ CosineTile cosine_tile(const Operands<T>& operands, int first_row, int first_column) {
  using Operand = Block<T, kTile, kDepth<T>>;
  T* stages = dynamic_shared<T>();
  const int num_steps = (operands.dim + kDepth<T> - 1) / kDepth<T>;
  const auto stage = [&](int step) { return stages + step % kCosineStages * 2 * Operand::kSize; };
  const auto load = [&](int step) {
    if (step < num_steps) {
      const int k = step * kDepth<T>;
      Operand::load(stage(step), operands.rows, operands.num_rows, operands.dim, first_row, k, operands.is_aligned);
      Operand::load(stage(step) + Operand::kSize, operands.columns, operands.num_columns, operands.dim, first_column, k,
                    operands.is_aligned);
    }
    commit_copies();
  };
  TileProduct<T> product;
  float squares = 0.0f;  // of a row in the first 64 threads, of a column in the others
  for (int step = 0; step < kCosineStages - 1; ++step) load(step);
  for (int step = 0; step < num_steps; ++step) {
    wait_for_copies<kCosineStages - 2>();
    __syncthreads();
    load(step + kCosineStages - 1);
    const T* staged = stage(step);
    const T* own = staged + threadIdx.x * Operand::kStride;  // the columns follow the rows
    squares += dot_of<T>(own, own);
    product.template add<true>(staged, staged + Operand::kSize);
  }
  __syncthreads();

  // The stages' memory now holds the norms and the tile.
  float* inverse = reinterpret_cast<float*>(stages);
  float* cosine = inverse + 2 * kTile;
  inverse[threadIdx.x] = inverse_of_norm(squares);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < product.kCount; ++e) {
    const int r = product.row(e), c = product.column(e);
    cosine[r * CosineTile::kStride + c] = product.at(e) * inverse[r] * inverse[kTile + c];
  }
  __syncthreads();
  return {inverse, cosine};
}

}  // namespace hicl::cuda
