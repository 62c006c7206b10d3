// InfoNCE over cosine similarities for small batches: loss and every gradient in two launches.
//
// First launch: a block takes a 64 × 64 tile of similarities, with the norms on the way, and sums its rows' exponentials.
// Second launch: a block takes 64 rows × 64 dimensions of one input's gradient. It joins the partial sums of the rows that
// it needs, makes the coefficients ∂loss/∂similarity out of similarities and multiplies them with the other input; one
// block more joins the losses. No atomics and no waiting between blocks: the launch in between is the only barrier.
//
// Coefficients are rounded to the inputs' type for the product, the positive's never: it stays out of the sums, loss =
// log(1 + e^(lse of the negatives − positive)), and comes to the gradients in float32. Inputs are multiplied as they are;
// norms go into the coefficients, which are scaled so that the largest factor of a row or column is 1.
#pragma once
#include "../constants.h"
#include "cosine_tile.cuh"
#include "info_nce.h"

namespace hicl::cuda {

static_assert(kColumnTile == kTile, "a block sums the tile that it multiplies");

constexpr float kLargestCosine = 1.0f - float(kAngleClamp);
constexpr float kMasked = -1e30f;  // for what is no negative's similarity: its exponential is 0, and 0 times it is 0
constexpr int kGradientStages = 3;
enum Partial { kLargestLogit, kExpSum, kMoment, kHardest };

template <typename T>
__device__ __forceinline__ constexpr float amplitude() {
  return 1.0f;
}
// float16 reaches 2¹⁶ and loses digits below 2⁻¹⁴: coefficients of at most 1 are stored 2¹⁴ times as large.
template <>
__device__ __forceinline__ constexpr float amplitude<__half>() {
  return 16384.0f;
}

// --- what both launches know -----------------------------------------------------------------------------------------

__device__ __forceinline__ float scale_of(const SmallInfoNCE& p) {
  return p.scale_on_device ? *p.scale_on_device : p.scale;
}
__device__ __forceinline__ int64_t target_of(const SmallInfoNCE& p, int row) { return p.target ? p.target[row] : row; }
__device__ __forceinline__ bool has_target(const SmallInfoNCE& p, int row) {
  const int64_t target = target_of(p, row);
  return target >= 0 && target < p.num_keys;
}

enum class Kind { kKeys, kNegatives, kExtra };

// Columns of one kind: the rows of one input, or logits as they are.
struct Columns {
  const void* rows;
  int count;
  int first;       // of all columns
  int first_tile;  // whole tiles lie side by side
  Kind kind;

  __device__ __forceinline__ bool are_keys() const { return kind == Kind::kKeys; }
  __device__ __forceinline__ int first_padded() const { return kTile * first_tile; }
};
__device__ __forceinline__ Columns keys_of(const SmallInfoNCE& p) { return {p.key, p.num_keys, 0, 0, Kind::kKeys}; }
__device__ __forceinline__ Columns negatives_of(const SmallInfoNCE& p) {
  return {p.negatives, p.num_negatives, p.num_keys, tiles_of(p.num_keys), Kind::kNegatives};
}
__device__ __forceinline__ Columns extra_of(const SmallInfoNCE& p) {
  return {nullptr, p.num_extra, p.num_keys + p.num_negatives, p.num_column_tiles(), Kind::kExtra};
}
__device__ __forceinline__ Columns columns_of_tile(const SmallInfoNCE& p, int tile) {
  if (tile < tiles_of(p.num_keys)) return keys_of(p);
  return tile < p.num_column_tiles() ? negatives_of(p) : extra_of(p);
}

// Whether the row has the column among its negatives.
__device__ __forceinline__ bool is_negative(const SmallInfoNCE& p, const Columns& columns, int row, int column) {
  if (!columns.are_keys()) return true;
  const bool is_in_group = p.query_group && p.query_group[row] == p.key_group[column];
  return !is_in_group && column != target_of(p, row);
}

__device__ __forceinline__ float logit_of(const SmallInfoNCE& p, const Columns& columns, int row, int column,
                                          float similarity, float scale) {
  const bool is_own = columns.kind == Kind::kNegatives && row == column;
  return similarity * scale + (is_own ? p.own_bias : 0.0f);
}

// --- first launch ----------------------------------------------------------------------------------------------------

// Two threads take a row of the tile each, every other column. The tile is of similarities, or of extra logits.
__device__ __forceinline__ void sum_rows(const SmallInfoNCE& p, const Columns& columns, const float* tile, int stride,
                                         int first_row, int first_column, int column_tile) {
  const int r = threadIdx.x / 2, row = first_row + r;
  const float* value = tile + r * stride;
  const bool are_logits = columns.kind == Kind::kExtra;
  const float scale = scale_of(p);
  const auto logit = [&](int c) {
    return are_logits ? value[c] : logit_of(p, columns, row, first_column + c, value[c], scale);
  };
  const int count = row < p.num_rows ? min(kTile, columns.count - first_column) : 0;
  float largest = -INFINITY, hardest = -INFINITY;
  for (int c = threadIdx.x % 2; c < count; c += 2) {
    if (value[c] == kMasked) continue;
    largest = fmaxf(largest, logit(c));
    if (!are_logits) hardest = fmaxf(hardest, value[c]);
  }
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  hardest = fmaxf(hardest, __shfl_xor_sync(kAllLanes, hardest, 1));
  const float offset = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f, moment = 0.0f;
  for (int c = threadIdx.x % 2; c < count; c += 2) {
    if (value[c] == kMasked) continue;
    const float e = expf(logit(c) - offset);
    sum += e, moment += are_logits ? 0.0f : e * value[c];
  }
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  moment += __shfl_xor_sync(kAllLanes, moment, 1);
  if (threadIdx.x % 2 || row >= p.num_rows) return;
  const int plane = p.num_sums() * p.num_rows;
  float* out = p.partial + column_tile * p.num_rows + row;
  out[kLargestLogit * plane] = largest, out[kExpSum * plane] = sum;
  out[kMoment * plane] = moment, out[kHardest * plane] = hardest;
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads) similarity_kernel(SmallInfoNCE p) {
  const int column_tile = blockIdx.x % p.num_sums(), row_tile = blockIdx.x / p.num_sums();
  const Columns columns = columns_of_tile(p, column_tile);
  const int first_row = row_tile * kTile, first_column = (column_tile - columns.first_tile) * kTile;
  if (columns.kind == Kind::kExtra) {
    const float* extra = p.extra_logits + int64_t(first_row) * p.num_extra + first_column;
    return sum_rows(p, columns, extra, p.num_extra, first_row, first_column, column_tile);
  }

  const Operands<T> operands{static_cast<const T*>(p.query), static_cast<const T*>(columns.rows), p.num_rows,
                             columns.count, p.dim, p.is_aligned};
  const CosineTile tile = cosine_tile(operands, first_row, first_column);
  const int rows_here = min(kTile, p.num_rows - first_row), columns_here = min(kTile, columns.count - first_column);
  for (int i = threadIdx.x; i < kTile * kTile; i += kTileThreads) {
    const int r = i / kTile, c = i % kTile, row = first_row + r;
    const bool is_inside = r < rows_here && c < columns_here;
    if (is_inside && columns.are_keys() && first_column + c == target_of(p, row)) p.positive[row] = tile.at(r, c);
    if (!is_inside || !is_negative(p, columns, row, first_column + c)) tile.at(r, c) = kMasked;
    p.similarity[row * p.similarity_stride() + column_tile * kTile + c] = tile.at(r, c);
    if (column_tile == 0 && c == 0 && r < rows_here && !has_target(p, row)) p.positive[row] = NAN;
  }
  __syncthreads();
  const int r = threadIdx.x % kTile;
  if (threadIdx.x < kTile) {
    if (column_tile == 0 && r < rows_here) p.inverse_norm[first_row + r] = tile.inverse[r];
  } else if (row_tile == 0 && r < columns_here) {
    p.inverse_norm[p.num_rows + columns.first + first_column + r] = tile.inverse[kTile + r];
  }
  sum_rows(p, columns, tile.cosine, CosineTile::kStride, first_row, first_column, column_tile);
}

// --- second launch ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float log1p_exp(float x) {
  return x > 0.0f ? x + log1pf(expf(-x)) : log1pf(expf(x));
}

// A row's softmax, joined from its column tiles.
struct Row {
  float negative_lse, hardest, positive, with_margin;
  float moment;        // mean similarity of the negatives, by their exponentials
  float of_negatives;  // the derivative by negative_lse of what is differentiated; 0 where there is no negative
  float of_positive;   // and by the positive's logit
  float factor;        // ∂loss/∂similarity of negative j is factor · e^(logit_j − negative_lse)
  float coefficient;   // ∂loss/∂similarity of the positive

  __device__ __forceinline__ Row(const SmallInfoNCE& p, int i) {
    const int tiles = p.num_sums(), plane = tiles * p.num_rows;
    const float* partial = p.partial + i;
    float largest = -INFINITY;
    hardest = -INFINITY;
    for (int t = 0; t < tiles; ++t) {
      largest = fmaxf(largest, partial[kLargestLogit * plane + t * p.num_rows]);
      hardest = fmaxf(hardest, partial[kHardest * plane + t * p.num_rows]);
    }
    const float offset = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f, weighted = 0.0f;
    for (int t = 0; t < tiles; ++t) {
      const float e = expf(partial[kLargestLogit * plane + t * p.num_rows] - offset);
      sum += e * partial[kExpSum * plane + t * p.num_rows];
      weighted += e * partial[kMoment * plane + t * p.num_rows];
    }
    negative_lse = offset + logf(sum);
    moment = sum == 0.0f ? 0.0f : weighted / sum;
    positive = p.positive[i];

    with_margin = positive;
    float slope = 1.0f;
    if (p.margin_sine != 0.0f) {
      const float s = fminf(fmaxf(positive, -kLargestCosine), kLargestCosine), sine = sqrtf((1.0f - s) * (1.0f + s));
      with_margin = s * p.margin_cosine - sine * p.margin_sine + (positive - positive);  // NaN stays
      slope = fabsf(positive) <= kLargestCosine ? p.margin_cosine + s / sine * p.margin_sine : 0.0f;
    }
    const float scale = scale_of(p);
    if (p.negative_grad) {
      of_negatives = negative_lse == -INFINITY ? 0.0f : p.negative_grad[i], of_positive = p.positive_grad[i];
    } else {
      const float share = 1.0f / (1.0f + expf(with_margin * scale - negative_lse));
      of_negatives = p.row_weight * (p.loss_grad ? p.loss_grad[i] : 1.0f) * share, of_positive = -of_negatives;
    }
    factor = of_negatives * scale;
    coefficient = of_positive * scale * slope;
  }
  __device__ __forceinline__ float loss(float scale) const { return log1p_exp(negative_lse - with_margin * scale); }
};

// One block: every row's loss and what is summed over rows.
__device__ __forceinline__ void summarise(const SmallInfoNCE& p, float* scratch) {
  float total = 0.0f, scale_grad = 0.0f;
  for (int i = threadIdx.x; i < p.num_rows; i += kTileThreads) {
    const Row row(p, i);
    const float loss = row.loss(scale_of(p));
    p.loss[i] = loss, p.negative_lse[i] = row.negative_lse, p.hardest[i] = row.hardest;
    total += loss;
    const float both = row.of_negatives + row.of_positive;  // 0 in a loss: nothing cancels where it is small
    scale_grad += row.of_negatives * (row.moment - row.with_margin) + both * row.with_margin;
  }
  total = block_sum(total, scratch), scale_grad = block_sum(scale_grad, scratch);
  if (threadIdx.x) return;
  if (p.total) *p.total = p.row_weight * total;
  if (p.scale_grad) *p.scale_grad = scale_grad;
}

// What a block has of shared memory in the second launch. The rows are those of its own tile where it makes the query's
// gradient, all of them where it makes a column's; norms are those of the other input. Beyond an input's end all are 0.
template <typename T>
struct GradientMemory {
  using Coefficients = Block<T, kTile, kDepth<T>>;
  using Others = Block<T, kDepth<T>, kTile>;
  alignas(16) T others[kGradientStages][Others::kSize];
  alignas(16) T coefficients[Coefficients::kSize];
  float negative_lse[kMostRows], factor[kMostRows], coefficient[kMostRows];
  float inverse[2 * kMostRows], norm[2 * kMostRows];
  float dot[kTileThreads / 16][kTile];  // unit vector · its gradient, in parts
  float scratch[kTileThreads / kWarp];

  __device__ __forceinline__ void set_norm(int i, float inverse_norm) {
    inverse[i] = inverse_norm, norm[i] = inverse_norm == 0.0f ? 0.0f : 1.0f / inverse_norm;
  }
  __device__ __forceinline__ void set_row(int i, const Row& row) {
    negative_lse[i] = row.negative_lse, factor[i] = row.factor, coefficient[i] = row.coefficient;
  }
  __device__ __forceinline__ void clear_row(int i) { negative_lse[i] = factor[i] = coefficient[i] = 0.0f; }

  // What positives add to the gradient with respect to the unit vectors, (kTile, kTile), once the product is done.
  __device__ __forceinline__ float* of_positives() {
    static_assert(sizeof(others) >= kTile * kTile * sizeof(float), "it lies where the other input was");
    return reinterpret_cast<float*>(others);
  }
};

// e^(logit − negative_lse) of a row's negative, 0 where there is none.
__device__ __forceinline__ float probability(float logit, float negative_lse) {
  return negative_lse == -INFINITY ? 0.0f : expf(logit - negative_lse);
}

// The last step: through the normalisation, ∂/∂x = (I − x̂ x̂ᵀ) g / ‖x‖.
template <typename T>
__device__ __forceinline__ float through_norm(float unit_grad, T x, float inverse, float dot) {
  const float along = has_constant_norm(inverse) ? 0.0f : dot * to_float(x) * inverse;
  return (unit_grad - along) * inverse;
}

// 64 query rows × 64 dimensions: Σ_j coefficient_ij k̂_j over all columns.
template <typename T>
__device__ __forceinline__ void query_gradient(const SmallInfoNCE& p, GradientMemory<T>& m, int first_row, int first_dim) {
  using Memory = GradientMemory<T>;
  constexpr int kPerRow = kDepth<T> / 4, kValues = kTile * kPerRow / kTileThreads;  // of four similarities each
  const int lane = threadIdx.x % kWarp;
  const float scale = scale_of(p);

  if (threadIdx.x < kTile) {
    m.clear_row(threadIdx.x);
    if (first_row + int(threadIdx.x) < p.num_rows) {
      const Row row(p, first_row + threadIdx.x);
      m.set_row(threadIdx.x, row);
      m.dot[0][threadIdx.x] = row.coefficient * row.positive;
    }
  }
  float largest = 0.0f;
  for (int j = threadIdx.x; j < p.similarity_stride(); j += kTileThreads) {
    const Columns columns = j < kTile * tiles_of(p.num_keys) ? keys_of(p) : negatives_of(p);
    const int at = j - columns.first_padded();
    m.set_norm(j, at < columns.count ? p.inverse_norm[p.num_rows + columns.first + at] : 0.0f);
    largest = fmaxf(largest, m.inverse[j]);
  }
  largest = block_max(largest, m.scratch);
  if (largest == 0.0f) largest = 1.0f;
  const float to_stored = amplitude<T>() / largest;

  const int key_steps = (p.num_keys + kDepth<T> - 1) / kDepth<T>;
  const int num_steps = key_steps + (p.num_negatives + kDepth<T> - 1) / kDepth<T>;
  const auto columns_at = [&](int step) { return step < key_steps ? keys_of(p) : negatives_of(p); };
  const auto first_at = [&](int step) { return (step < key_steps ? step : step - key_steps) * kDepth<T>; };
  const auto load = [&](int step) {
    if (step < num_steps) {
      const Columns columns = columns_at(step);
      Memory::Others::load(m.others[step % kGradientStages], static_cast<const T*>(columns.rows), columns.count, p.dim,
                           first_at(step), first_dim, p.is_aligned);
    }
    commit_copies();
  };
  // A thread has the same rows and places in every step.
  const int c = threadIdx.x % kPerRow * 4;
  const auto row_of = [&](int v) { return int(threadIdx.x + v * kTileThreads) / kPerRow; };
  Vector<float> similarity[kValues];
  const auto load_similarities = [&](int step) {
    if (step >= num_steps) return;
    const int column = columns_at(step).first_padded() + first_at(step) + c;
    const float* from = p.similarity + first_row * p.similarity_stride() + column;
#pragma unroll
    for (int v = 0; v < kValues; ++v)
      similarity[v] = *reinterpret_cast<const Vector<float>*>(from + row_of(v) * p.similarity_stride());
  };

  TileProduct<T> product;
  float dot[kValues] = {};
  for (int step = 0; step < kGradientStages - 1; ++step) load(step);
  load_similarities(0);
  for (int step = 0; step < num_steps; ++step) {
    const Columns columns = columns_at(step);
    const int column = first_at(step) + c;
#pragma unroll
    for (int v = 0; v < kValues; ++v)
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int r = row_of(v), j = columns.first_padded() + column + x;
        const float s = similarity[v].element[x];
        const float logit = logit_of(p, columns, first_row + r, column + x, s, scale);
        const T stored = rounded<T>(probability(logit, m.negative_lse[r]) * (m.inverse[j] * to_stored));
        m.coefficients[r * Memory::Coefficients::kStride + c + x] = stored;
        dot[v] += to_float(stored) * m.norm[j] * s;
      }
    wait_for_copies<kGradientStages - 2>();
    __syncthreads();
    load(step + kGradientStages - 1);
    load_similarities(step + 1);
    product.template add<false>(m.coefficients, m.others[step % kGradientStages]);
    __syncthreads();
  }
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
#pragma unroll
    for (int distance = kPerRow / 2; distance > 0; distance /= 2)
      dot[v] += __shfl_xor_sync(kAllLanes, dot[v], distance);
    if (c == 0) m.dot[0][row_of(v)] += dot[v] * (m.factor[row_of(v)] / to_stored);
  }

  float* of_positives = m.of_positives();
  for (int r = threadIdx.x / kWarp; r < kTile && first_row + r < p.num_rows; r += kTileThreads / kWarp) {
    const int target = has_target(p, first_row + r) ? int(target_of(p, first_row + r)) : 0;
    const T* key = static_cast<const T*>(p.key) + target * p.dim;
    for (int d = lane; d < kTile; d += kWarp)
      of_positives[r * kTile + d] =
          first_dim + d < p.dim ? m.coefficient[r] * m.inverse[target] * to_float(key[first_dim + d]) : 0.0f;
  }
  __syncthreads();

#pragma unroll
  for (int e = 0; e < product.kCount; ++e) {
    const int r = product.row(e), row = first_row + r, d = first_dim + product.column(e);
    if (row >= p.num_rows || d >= p.dim) continue;
    const float unit_grad = product.at(e) * (m.factor[r] / to_stored) + of_positives[r * kTile + product.column(e)];
    const T x = static_cast<const T*>(p.query)[row * p.dim + d];
    p.query_grad[row * p.dim + d] = through_norm(unit_grad, x, p.inverse_norm[row], m.dot[0][r]);
  }
}

// 64 keys or negatives × 64 dimensions: Σ_i coefficient_ij q̂_i over all rows.
template <typename T>
__device__ __forceinline__ void column_gradient(const SmallInfoNCE& p, GradientMemory<T>& m, const Columns& columns,
                                                float* gradient, int first_column, int first_dim) {
  using Memory = GradientMemory<T>;
  constexpr int kPerRow = kTile / 4, kValues = kDepth<T> * kPerRow / kTileThreads;  // of four similarities each
  const int lane = threadIdx.x % kWarp;
  const float scale = scale_of(p);
  const T* query = static_cast<const T*>(p.query);

  float largest = 0.0f;
  for (int i = threadIdx.x; i < kTile * tiles_of(p.num_rows); i += kTileThreads) {
    m.clear_row(i);
    m.set_norm(i, i < p.num_rows ? p.inverse_norm[i] : 0.0f);
    if (i >= p.num_rows) continue;
    const Row row(p, i);
    m.set_row(i, row);
    largest = fmaxf(largest, fabsf(row.factor * m.inverse[i]));
  }
  largest = block_max(largest, m.scratch);
  if (largest == 0.0f) largest = 1.0f;
  const float to_stored = amplitude<T>() / largest;

  const int num_steps = (p.num_rows + kDepth<T> - 1) / kDepth<T>;
  const auto load = [&](int step) {
    if (step < num_steps)
      Memory::Others::load(m.others[step % kGradientStages], query, p.num_rows, p.dim, step * kDepth<T>, first_dim,
                           p.is_aligned);
    commit_copies();
  };
  // A thread has the same columns in every step.
  const int c = threadIdx.x % kPerRow * 4, column = first_column + c;
  const auto row_of = [&](int v) { return int(threadIdx.x + v * kTileThreads) / kPerRow; };
  Vector<float> similarity[kValues];
  const auto load_similarities = [&](int step) {
    if (step >= num_steps) return;
    const float* from = p.similarity + step * kDepth<T> * p.similarity_stride() + columns.first_padded() + column;
#pragma unroll
    for (int v = 0; v < kValues; ++v)
      similarity[v] = *reinterpret_cast<const Vector<float>*>(from + row_of(v) * p.similarity_stride());
  };

  TileProduct<T> product;
  float dot[4] = {};
  for (int step = 0; step < kGradientStages - 1; ++step) load(step);
  load_similarities(0);
  for (int step = 0; step < num_steps; ++step) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int row = step * kDepth<T> + row_of(v);
      const float to_coefficient = m.factor[row] * m.inverse[row] * to_stored;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const float s = similarity[v].element[x];
        const float logit = logit_of(p, columns, row, column + x, s, scale);
        const T stored = rounded<T>(probability(logit, m.negative_lse[row]) * to_coefficient);
        m.coefficients[(c + x) * Memory::Coefficients::kStride + row_of(v)] = stored;
        dot[x] += to_float(stored) * m.norm[row] * s;
      }
    }
    wait_for_copies<kGradientStages - 2>();
    __syncthreads();
    load(step + kGradientStages - 1);
    load_similarities(step + 1);
    product.template add<false>(m.coefficients, m.others[step % kGradientStages]);
    __syncthreads();
  }
#pragma unroll
  for (int x = 0; x < 4; ++x) m.dot[threadIdx.x / kPerRow][c + x] = dot[x] / to_stored;
  __syncthreads();

  // The rows whose positive a key is, in order.
  float* of_positives = m.of_positives();
  for (int k = threadIdx.x / kWarp; k < kTile; k += kTileThreads / kWarp) {
    const int key = first_column + k;
    float sum[2] = {}, along = 0.0f;
    for (int part = 0; part < kTileThreads / kPerRow; ++part) along += m.dot[part][k];
    const auto take = [&](int i) {
      along += m.coefficient[i] * p.positive[i];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int d = first_dim + lane + v * kWarp;
        if (d < p.dim) sum[v] += m.coefficient[i] * m.inverse[i] * to_float(query[i * p.dim + d]);
      }
    };
    if (columns.are_keys() && key < columns.count) {
      if (!p.target) {
        if (key < p.num_rows) take(key);
      } else {
        for (int first = 0; first < p.num_rows; first += kWarp) {
          const int i = first + lane;
          unsigned hits = __ballot_sync(kAllLanes, i < p.num_rows && p.target[i] == key);
          for (; hits; hits &= hits - 1) take(first + __ffs(hits) - 1);
        }
      }
    }
    of_positives[k * kTile + lane] = sum[0], of_positives[k * kTile + lane + kWarp] = sum[1];
    __syncwarp();  // every lane has read the parts
    if (lane == 0) m.dot[0][k] = along;
  }
  __syncthreads();

#pragma unroll
  for (int e = 0; e < product.kCount; ++e) {
    const int r = product.row(e), row = first_column + r, d = first_dim + product.column(e);
    if (row >= columns.count || d >= p.dim) continue;
    const float unit_grad = product.at(e) / to_stored + of_positives[r * kTile + product.column(e)];
    const T x = static_cast<const T*>(columns.rows)[row * p.dim + d];
    const float inverse = p.inverse_norm[p.num_rows + columns.first + row];
    gradient[row * p.dim + d] = through_norm(unit_grad, x, inverse, m.dot[0][r]);
  }
}

// 64 rows of the extra logits' gradient. A row's softmax is known to one thread, its logits to the others.
__device__ __forceinline__ void extra_gradient(const SmallInfoNCE& p, float* negative_lse, float* to_probability,
                                               int first_row) {
  const int rows_here = min(kTile, p.num_rows - first_row);
  if (int(threadIdx.x) < rows_here) {
    const Row row(p, first_row + threadIdx.x);
    negative_lse[threadIdx.x] = row.negative_lse, to_probability[threadIdx.x] = row.of_negatives;
  }
  __syncthreads();
  const int64_t first = int64_t(first_row) * p.num_extra;
  for (int i = threadIdx.x; i < rows_here * p.num_extra; i += kTileThreads) {
    const int r = i / p.num_extra;
    p.extra_logits_grad[first + i] = to_probability[r] * probability(p.extra_logits[first + i], negative_lse[r]);
  }
}

inline int gradient_blocks(const SmallInfoNCE& p) {
  const int tiles = (p.query_grad ? tiles_of(p.num_rows) : 0) + (p.key_grad ? tiles_of(p.num_keys) : 0) +
                    (p.negatives_grad ? tiles_of(p.num_negatives) : 0);
  return 1 + (p.extra_logits_grad ? tiles_of(p.num_rows) : 0) + tiles * tiles_of(p.dim);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) gradient_kernel(SmallInfoNCE p) {
  GradientMemory<T>& memory = *dynamic_shared<GradientMemory<T>>();
  if (blockIdx.x == 0) return summarise(p, memory.scratch);
  int block = int(blockIdx.x) - 1;
  if (p.extra_logits_grad) {
    if (block < tiles_of(p.num_rows))
      return extra_gradient(p, memory.negative_lse, memory.factor, block * kTile);
    block -= tiles_of(p.num_rows);
  }
  const int first_dim = block % tiles_of(p.dim) * kTile;
  int tile = block / tiles_of(p.dim);
  if (p.query_grad) {
    if (tile < tiles_of(p.num_rows)) return query_gradient(p, memory, tile * kTile, first_dim);
    tile -= tiles_of(p.num_rows);
  }
  if (p.key_grad) {
    if (tile < tiles_of(p.num_keys))
      return column_gradient(p, memory, keys_of(p), p.key_grad, tile * kTile, first_dim);
    tile -= tiles_of(p.num_keys);
  }
  column_gradient(p, memory, negatives_of(p), p.negatives_grad, tile * kTile, first_dim);
}

}  // namespace hicl::cuda
