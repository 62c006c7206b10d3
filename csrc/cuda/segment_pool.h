// Launchers of ragged weighted pooling: memory on the device, an error code of CUDA's back. No CUDA and no PyTorch in here.
#pragma once
#include <algorithm>
#include <cstdint>

#include "types.h"

namespace hicl::cuda {

// Sequence b owns the segments offsets[b]:offsets[b + 1]; a warp takes `chunk` segments in a row, whosoever they are.
struct Ragged {
  const int64_t* offsets;  // (B + 1,)
  const float* weights;    // (S,), or null: all ones
  int64_t num_sequences, num_segments, dim, chunk;
  ElementType type;  // of segments, pooled rows and their gradients
  bool is_aligned;   // every row begins at a multiple of 16 bytes

  int64_t num_chunks() const { return (num_segments + chunk - 1) / chunk; }
};

// Enough warps to fill a GPU where there is work for them; at 64 segments the parts that are left over are 3 % of the rows.
inline int64_t chunk_for(int64_t num_segments, int64_t dim) {
  constexpr int64_t kWarps = 8192, kSlice = 256, kLeast = 4, kMost = 64;
  const int64_t slices = (dim + kSlice - 1) / kSlice;
  return std::clamp((num_segments * slices + kWarps - 1) / kWarps, kLeast, kMost);
}

struct PoolBuffers {
  const void* segments;  // (S, D); null with dim 0: the weights alone are summed
  void* pooled;          // out (B, D): Σ_j w_j h_j / Σ_j w_j, zeros where the weights sum to zero
  float* inverse_total;  // out (B,): 1 / Σ_j w_j, or 0; null: not wanted
  float* part;           // workspace (num_chunks, 2, D): of sequences cut by the chunk's begin and by its end
  float* part_weight;    // workspace (num_chunks, 2)
};
int launch_pool(const Ragged& ragged, const PoolBuffers& buffers, void* stream);

// dot_j = g_b · h_j
int launch_segment_dots(const Ragged& ragged, const void* segments, const void* pooled_grad, float* dot, void* stream);

struct SpreadBuffers {
  const void* pooled_grad;     // (B, D)
  const float* inverse_total;  // (B,)
  const float* dot;            // (S,) g_b · h_j, and
  const float* mean_dot;       // (B,) its weighted mean in the sequence; both null where no weights' gradient is wanted
  void* segments_grad;         // out (S, D): w_j / Σ w · g_b; null: not wanted
  float* weights_grad;         // out (S,): (g_b · h_j − mean) / Σ w; null: not wanted
};
int launch_spread(const Ragged& ragged, const SpreadBuffers& buffers, void* stream);

}  // namespace hicl::cuda
