// Launchers of what InfoNCE's large-batch path does row by row: memory on the device, an error code of CUDA's back. No CUDA
// and no PyTorch in here.
#pragma once
#include <cstdint>

#include "types.h"

namespace hicl::cuda {

// Contiguous rows of one type; sums, factors and gradients are float32.
struct RowShape {
  int64_t num_rows, dim;
  ElementType type;
  bool is_aligned;  // in every matrix of the call every row begins at a multiple of 16 bytes
};

struct NormaliseBuffers {
  const void* x;   // (N, D)
  float* inverse;  // out (N,): 1 / max(‖x‖, floor), 0 for a zero row
  void* unit;      // out (N, D): x / ‖x‖; null: not wanted
  float floor;
};
int launch_normalise(const RowShape& shape, const NormaliseBuffers& buffers, void* stream);

// scaled (N, D) = factor (N,) · x (N, D), rounded once
int launch_scale_rows(const RowShape& shape, const void* x, const float* factor, void* scaled, void* stream);

// The other side's rows, which a row has its positives among.
struct OtherRows {
  const void* x;         // (K, D)
  const float* inverse;  // (K,) 1 / ‖x‖
  int64_t num_rows;
};

struct PositiveBuffers {
  const void* query;           // (N, D)
  const float* query_inverse;  // (N,)
  OtherRows key;
  const int64_t* target;  // (N,)
  float* positive;        // out (N,): the cosine of each query with its target; NaN where there is no such key
};
int launch_positive(const RowShape& shape, const PositiveBuffers& buffers, void* stream);

struct NormGradientBuffers {
  const float* product;  // (N, D)
  const float* factor;   // (N,) of the product, factor_stride apart; 0: one for all
  int64_t factor_stride;
  const void* x;         // (N, D)
  const float* inverse;  // (N,)
  float floor;           // of ‖x‖
  // Partners: with `begin`, partner[begin[i]:begin[i + 1]]; without it partner[i]; without that either, row i if there is
  // one. No coefficients: none.
  OtherRows other;
  const float* coefficient;  // of a partner's unit row: (N,); with `begin` (K,), the partners'
  const int64_t* partner;    // (N,); with `begin` (K,)
  const int64_t* begin;      // (N + 1,)
  float* gradient;           // out (N, D); may be the product
};
int launch_norm_gradient(const RowShape& shape, const NormGradientBuffers& buffers, void* stream);

}  // namespace hicl::cuda
