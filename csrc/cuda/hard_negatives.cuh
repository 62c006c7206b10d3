// The k largest similarities of each row, for small batches, in two launches: a block makes a 64 × 64 tile of cosines;
// then a warp takes a row into its registers and gives its best candidate k times.
//
// A candidate is its rank, a number that rises with the similarity, and its column. No two are the same, so that neither
// the order of comparisons nor that of warps can be seen in the result.
#pragma once
#include "cosine_tile.cuh"
#include "hard_negatives.h"

namespace hicl::cuda {

constexpr int kSelectThreads = 128, kRowsPerBlock = kSelectThreads / kWarp;

template <typename T>
__global__ void __launch_bounds__(kTileThreads) cosine_kernel(HardNegatives p) {
  const int column_tiles = tiles_of(p.num_keys);
  const int first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  const Operands<T> operands{static_cast<const T*>(p.query), static_cast<const T*>(p.key), p.num_rows, p.num_keys, p.dim,
                             p.is_aligned};
  const CosineTile tile = cosine_tile(operands, first_row, first_column);
  for (int i = threadIdx.x; i < kTile * kTile; i += kTileThreads)
    p.cosine[(first_row + i / kTile) * p.cosine_stride() + first_column + i % kTile] = tile.at(i / kTile, i % kTile);
}

constexpr uint32_t kNoCandidate = 0, kLargestRank = 0xffffffffu, kSignBit = 0x80000000u;

// NaN comes before all numbers, and −0 is 0.
__device__ __forceinline__ uint32_t rank_of(float similarity) {
  if (similarity != similarity) return kLargestRank;
  const uint32_t bits = __float_as_uint(similarity == 0.0f ? 0.0f : similarity);
  return bits & kSignBit ? ~bits : bits | kSignBit;
}
__device__ __forceinline__ float similarity_of(uint32_t rank) {
  return __uint_as_float(rank & kSignBit ? rank & ~kSignBit : ~rank);
}

// One row's columns, spread over a warp: lane l has columns l, l + 32, ...
template <int kPerLane>
class RowCandidates {
 public:
  __device__ __forceinline__ RowCandidates(const HardNegatives& p, int row) {
    const int64_t target = !p.leaves_out_target ? -1 : p.target ? p.target[row] : row;
    const float* cosine = p.cosine + row * p.cosine_stride();
#pragma unroll
    for (int v = 0; v < kPerLane; ++v) {
      const int column = column_of(v);
      const bool is_left_out = column >= p.num_keys || column == target ||
                               (p.query_group && p.query_group[row] == p.key_group[column]);
      rank_[v] = is_left_out ? kNoCandidate : rank_of(cosine[column]);
    }
    find_own_best();
  }

  // The warp's best candidate: its rank above its column, counted down. 0: there is none left.
  __device__ __forceinline__ uint64_t best() const {
    uint64_t best = own_best_;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const uint64_t other = __shfl_xor_sync(kAllLanes, best, distance);
      best = other > best ? other : best;
    }
    return best;
  }
  __device__ __forceinline__ void remove(uint64_t candidate) {
    if (own_best_ != candidate) return;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v)
      if (column_of(v) == column_in(candidate)) rank_[v] = kNoCandidate;
    find_own_best();
  }
  __device__ __forceinline__ static int column_in(uint64_t candidate) { return int(~uint32_t(candidate)); }

 private:
  __device__ __forceinline__ static int column_of(int v) { return int(threadIdx.x % kWarp) + v * kWarp; }

  __device__ __forceinline__ void find_own_best() {
    uint32_t rank = kNoCandidate;
    int column = 0;
#pragma unroll
    for (int v = 0; v < kPerLane; ++v)
      if (rank_[v] > rank) rank = rank_[v], column = column_of(v);
    own_best_ = rank == kNoCandidate ? 0 : uint64_t(rank) << 32 | ~uint32_t(column);
  }

  uint32_t rank_[kPerLane];
  uint64_t own_best_;
};

template <int kPerLane>
__global__ void __launch_bounds__(kSelectThreads) select_kernel(HardNegatives p) {
  const int row = blockIdx.x * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= p.num_rows) return;
  RowCandidates<kPerLane> candidates(p, row);
  for (int place = 0; place < p.k; ++place) {
    const uint64_t best = candidates.best();
    candidates.remove(best);
    if (threadIdx.x % kWarp) continue;
    p.similarity[row * p.k + place] = best ? similarity_of(uint32_t(best >> 32)) : -INFINITY;
    p.index[row * p.k + place] = best ? candidates.column_in(best) : -1;
  }
}

}  // namespace hicl::cuda
