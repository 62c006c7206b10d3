// Launchers of InfoNCE for small batches: memory on the device, an error code of CUDA's back. No CUDA and no PyTorch here.
#pragma once
#include <cstdint>

#include "types.h"

namespace hicl::cuda {

constexpr int kMostRows = 1024;  // of queries, keys and negatives; dimensions and extra logits too
constexpr int kColumnTile = 64;   // columns of a row that one block sums
constexpr int kNumPartials = 4;   // what it leaves for each row

constexpr int tiles_of(int count) { return (count + kColumnTile - 1) / kColumnTile; }

// All matrices are contiguous and of one type. Columns are the M keys, the P explicit negatives, the E extra
// logits.
struct SmallInfoNCE {
  const void *query, *key, *negatives;  // (N, D), (M, D), (P, D)
  const float* extra_logits;            // (N, E)
  const int64_t* target;                // (N,); null: row i's positive is key i
  const int64_t *query_group, *key_group;  // (N,), (M,) a row's group has no negatives of it among the keys; null: none
  const float* loss_grad;               // (N,) the rows' weights; null: row_weight is everyone's
  const float *negative_grad, *positive_grad;  // (N,) what is differentiated in place of the loss: log Σ e^logit over a row's
                                               // columns but its positive, and the positive's logit; null: the loss
  const float* scale_on_device;         // () 1 / temperature; null: it is `scale`
  int num_rows, num_keys, num_negatives, num_extra, dim;
  ElementType type;
  bool is_aligned;  // every row begins at a multiple of 16 bytes
  float scale, row_weight, own_bias;  // own_bias is added to the logit of row i's negative i
  float margin_cosine, margin_sine;   // 1 and 0: no margin

  // workspace
  float* similarity;    // (64 · row tiles, 64 · column tiles); kMasked where there is no pair and where a key is no negative
  float* inverse_norm;  // (N + M + P,) 1 / max(‖x‖, 10⁻¹²); 0 for a zero row
  float* partial;       // (kNumPartials, num_sums, N)

  // out
  float *loss, *negative_lse, *positive, *hardest;  // (N,)
  float *total, *scale_grad;                        // () row_weight · Σ loss; null: not wanted
  float *query_grad, *key_grad, *negatives_grad;    // (N, D), (M, D), (P, D); null: not wanted
  float* extra_logits_grad;                         // (N, E); null: not wanted

  constexpr int num_column_tiles() const { return tiles_of(num_keys) + tiles_of(num_negatives); }
  constexpr int num_sums() const { return num_column_tiles() + tiles_of(num_extra); }
  constexpr int similarity_stride() const { return kColumnTile * num_column_tiles(); }
};

// Similarities, norms and each row's partial sums; then all else.
int launch_similarities(const SmallInfoNCE& problem, void* stream);
int launch_gradients(const SmallInfoNCE& problem, void* stream);

}  // namespace hicl::cuda
