// Launchers of hard-negative mixing for small batches: memory on the device, an error code back. No CUDA and no PyTorch.
#pragma once
#include <cstdint>

#include "types.h"

namespace hicl::cuda {

constexpr int kMostMixed = 64;  // negatives of a row

// Row i's mixtures are g = α n_a + (1 − α) n_b of two of its negatives n_c = bank[index[i, c]].
struct MixedNegatives {
  const void *query, *bank;  // (N, D), (B, D), contiguous and of one type
  const int64_t* index;      // (N, k); where there is no such row of the bank, what is mixed of it is NaN
  const int64_t* pairs;      // (N, m, 2); likewise where there is no such column of index
  int num_rows, num_bank, k, num_pairs, dim;
  ElementType type;
  bool is_aligned;  // every row begins at a multiple of 16 bytes
  float alpha;

  float *cosine, *inverse_norm;  // (N, m) cos(q, g) and 1 / ‖g‖, 0 where g vanishes
};
int launch_mixtures(const MixedNegatives& problem, void* stream);

// Rows first:first + count, so that there need not be memory for the additions of all.
struct MixtureGradients {
  const float* cosine_grad;  // (N, m)
  int first, count;
  float* addition;    // workspace (count, k, D): what each of a row's negatives gets of it; null where bank_grad is
  float* query_grad;  // out (N, D); null: not wanted
  float* bank_grad;   // out (B, D), added to from the second rows on; null: not wanted
};
int launch_mixture_gradients(const MixedNegatives& problem, const MixtureGradients& gradients, void* stream);

}  // namespace hicl::cuda
