// Launcher of the selection of hard negatives: memory on the device, an error code back. No CUDA and no PyTorch here.
#pragma once
#include <cstdint>

#include "info_nce.h"

namespace hicl::cuda {

struct HardNegatives {
  const void *query, *key;                 // (N, D), (M, D), contiguous and of one type
  const int64_t* target;                   // (N,) −1: the row has none; null: row i's is key i
  const int64_t *query_group, *key_group;  // (N,), (M,); null: no groups
  int num_rows, num_keys, dim, k;
  ElementType type;
  bool is_aligned;  // every row begins at a multiple of 16 bytes
  bool leaves_out_target;

  float* cosine;      // workspace (64 · row tiles, 64 · key tiles)
  float* similarity;  // out (N, k), larger first; −inf in the places left over
  int64_t* index;     // out (N, k); −1 there

  constexpr int cosine_stride() const { return kColumnTile * tiles_of(num_keys); }
};
int launch_hard_negatives(const HardNegatives& problem, void* stream);

}  // namespace hicl::cuda
