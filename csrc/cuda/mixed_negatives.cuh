// Hard-negative mixing for small batches: cos(q, g) of each row's mixtures g = α n_a + (1 − α) n_b, and the gradients.
//
// A block takes a row. With X = (n_1, ..., n_k, q), which passes through shared memory a few dimensions at a time, all that
// the cosines need is in X Xᵀ: k similarities, the k × k Gram matrix and ‖q‖². No mixture is ever there.
//
// The gradients with respect to the rows of X are A X for a symmetric A: with u the upstream gradient and w_pc = α [c is
// pair p's first] + (1 − α) [c is its second], c_c = Σ_p w_pc u_p / ‖g_p‖ and M_ce = Σ_p w_pc w_pe u_p cos_p / ‖g_p‖²,
//
//     A = ( −M          c / ‖q‖               )
//         ( cᵀ / ‖q‖   −Σ_p u_p cos_p / ‖q‖² )    the last through the query's normalisation.
//
// Rows of the bank are shared: each row writes what it has for its k negatives, and a second launch adds what a row of the
// bank got, in order. No atomics.
#pragma once
#include "../constants.h"
#include "cosine_tile.cuh"
#include "mixed_negatives.h"

namespace hicl::cuda {

constexpr int kMixingStages = 3;
// ‖g‖² comes from a sum whose terms can cancel, with an error of a few roundings of the terms. A smaller result has no
// digits that are right: such a mixture has no direction.
constexpr float kVanishing = kVanishingRoundings * 1.1920929e-7f;

// The entries of a symmetric matrix on and below its diagonal, row by row.
struct Entry {
  int row, column;  // row ≥ column

  __device__ __forceinline__ explicit Entry(int at)
      : row(int(sqrtf(2.0f * float(at) + 0.25f) - 0.5f)), column(at - count_before(row)) {}  // (row + ½)² is exact
  static constexpr int count_before(int row) { return row * (row + 1) / 2; }
  static constexpr int at(int a, int b) { return a < b ? count_before(b) + a : count_before(a) + b; }
};

// X of one row: its negatives and, behind them, its query; zeros where there is no such row of the bank.
template <typename T>
class Gathered {
 public:
  static constexpr int kStride = kDepth<T> + kPadding<T>;
  static constexpr size_t bytes(int k) { return kMixingStages * (k + 1) * kStride * sizeof(T); }

  // `chosen` (k,) and `stages` are in shared memory. All threads meet in here.
  __device__ __forceinline__ Gathered(const MixedNegatives& p, int row, T* stages, int* chosen)
      : p_(p), query_(static_cast<const T*>(p.query) + int64_t(row) * p.dim), stages_(stages), chosen_(chosen) {
    for (int c = threadIdx.x; c < p.k; c += kTileThreads) {
      const int64_t at = p.index[int64_t(row) * p.k + c];
      chosen[c] = at >= 0 && at < p.num_bank ? int(at) : -1;
    }
    __syncthreads();
    for (int step = 0; step < kMixingStages - 1; ++step) load(step);
  }
  __device__ __forceinline__ int num_steps() const { return (p_.dim + kDepth<T> - 1) / kDepth<T>; }
  __device__ __forceinline__ const T* query() const { return query_; }
  __device__ __forceinline__ bool has(int c) const { return chosen_[c] >= 0; }

  // Dimensions kDepth<T> · step on, (k + 1) rows kStride apart, for every thread. Steps come in order.
  __device__ __forceinline__ const T* wait_for(int step) {
    wait_for_copies<kMixingStages - 2>();
    __syncthreads();
    load(step + kMixingStages - 1);
    return stage(step);
  }

 private:
  __device__ __forceinline__ T* stage(int step) const {
    return stages_ + step % kMixingStages * (p_.k + 1) * kStride;
  }
  __device__ __forceinline__ void load(int step) {
    constexpr int kPerRow = kDepth<T> / Vector<T>::kSize;
    const T* bank = static_cast<const T*>(p_.bank);
    for (int i = threadIdx.x; step < num_steps() && i < (p_.k + 1) * kPerRow; i += kTileThreads) {
      const int r = i / kPerRow, c = i % kPerRow * Vector<T>::kSize, first = step * kDepth<T> + c;
      const int bank_row = r < p_.k ? chosen_[r] : 0;
      const T* row = r < p_.k ? bank + int64_t(bank_row) * p_.dim : query_;
      load_vector(stage(step) + r * kStride + c, row + first, bank_row >= 0 ? p_.dim - first : 0, query_, p_.is_aligned);
    }
    commit_copies();
  }

  const MixedNegatives& p_;
  const T* query_;
  T* stages_;
  int* chosen_;
};

// Which two of the row's negatives are mixed; `exists` where there are such.
struct Pair {
  int first, second;
  bool exists;

  __device__ __forceinline__ Pair(const MixedNegatives& p, int row, int at) {
    const int64_t* pair = p.pairs + 2 * (int64_t(row) * p.num_pairs + at);
    exists = pair[0] >= 0 && pair[0] < p.k && pair[1] >= 0 && pair[1] < p.k;
    first = exists ? int(pair[0]) : 0, second = exists ? int(pair[1]) : 0;
  }
};

// --- cosines ---------------------------------------------------------------------------------------------------------

// What a block has of shared memory, one after the other.
template <typename T>
struct MixtureMemory {
  T* stages;
  float* product;  // entries of X Xᵀ
  int* chosen;     // (k,)

  __device__ __forceinline__ explicit MixtureMemory(int k)
      : stages(dynamic_shared<T>()),
        product(reinterpret_cast<float*>(dynamic_shared<unsigned char>() + Gathered<T>::bytes(k))),
        chosen(reinterpret_cast<int*>(product + Entry::count_before(k + 1))) {}
  static size_t bytes(int k) {
    return Gathered<T>::bytes(k) + Entry::count_before(k + 1) * sizeof(float) + k * sizeof(int);
  }
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads) mixture_kernel(MixedNegatives p) {
  const int row = blockIdx.x, count = Entry::count_before(p.k + 1);
  const MixtureMemory<T> memory(p.k);
  float* product = memory.product;
  Gathered<T> gathered(p, row, memory.stages, memory.chosen);
  for (int at = threadIdx.x; at < count; at += kTileThreads) product[at] = 0.0f;
  for (int step = 0; step < gathered.num_steps(); ++step) {
    const T* x = gathered.wait_for(step);
    for (int at = threadIdx.x; at < count; at += kTileThreads) {
      const Entry entry(at);
      product[at] += dot_of<T>(x + entry.row * gathered.kStride, x + entry.column * gathered.kStride);
    }
  }
  __syncthreads();

  const float alpha = p.alpha, beta = 1.0f - p.alpha;
  const float query_inverse = inverse_of_norm(product[Entry::at(p.k, p.k)]);
  for (int at = threadIdx.x; at < p.num_pairs; at += kTileThreads) {
    const Pair pair(p, row, at);
    const int a = pair.first, b = pair.second;
    const float parts = alpha * alpha * product[Entry::at(a, a)] + beta * beta * product[Entry::at(b, b)];
    const float squared = parts + 2.0f * alpha * beta * product[Entry::at(a, b)];
    const bool vanishes = squared < fmaxf(kVanishing * parts, kNormFloor * kNormFloor);
    const bool exists = pair.exists && gathered.has(a) && gathered.has(b);
    const float inverse = !exists ? NAN : vanishes ? 0.0f : 1.0f / sqrtf(squared);
    const float along = alpha * product[Entry::at(p.k, a)] + beta * product[Entry::at(p.k, b)];
    p.inverse_norm[int64_t(row) * p.num_pairs + at] = inverse;
    p.cosine[int64_t(row) * p.num_pairs + at] = along * query_inverse * inverse;
  }
}

// --- gradients -------------------------------------------------------------------------------------------------------

constexpr int kOutputsAtATime = 4;  // of A X, one below the other, for one dimension

template <typename T>
struct MixtureGradientMemory {
  T* stages;
  float* matrix;            // A: (k + 1) rows, stride(k) apart
  int* chosen;              // (k,)
  int *first, *second;      // (kTileThreads,) of as many pairs
  float *pull, *curvature;  // (kTileThreads,) u / ‖g‖ and u cos / ‖g‖²
  float* scratch;           // (kTileThreads / kWarp,)

  __device__ __forceinline__ explicit MixtureGradientMemory(int k)
      : stages(dynamic_shared<T>()),
        matrix(reinterpret_cast<float*>(dynamic_shared<unsigned char>() + Gathered<T>::bytes(k))),
        chosen(reinterpret_cast<int*>(matrix + (k + 1) * stride(k))), first(chosen + k), second(first + kTileThreads),
        pull(reinterpret_cast<float*>(second + kTileThreads)), curvature(pull + kTileThreads),
        scratch(curvature + kTileThreads) {}
  static constexpr int stride(int k) { return (k + kOutputsAtATime) / kOutputsAtATime * kOutputsAtATime; }
  static size_t bytes(int k) {
    return Gathered<T>::bytes(k) + ((k + 1) * stride(k) + k + 4 * kTileThreads + kTileThreads / kWarp) * sizeof(float);
  }
};

// A, by 128 threads: a thread has a negative's column, so that none adds to another's. It is there behind the next barrier.
template <typename T>
__device__ __forceinline__ void make_matrix(const MixedNegatives& p, const MixtureGradients& g, int row,
                                            const Gathered<T>& gathered, const MixtureGradientMemory<T>& memory) {
  const float alpha = p.alpha, beta = 1.0f - p.alpha;
  const int stride = memory.stride(p.k), c = threadIdx.x;
  float* column = memory.matrix + c;
  float squares = 0.0f;
  for (int d = threadIdx.x; d < p.dim; d += kTileThreads) {
    const float x = to_float(gathered.query()[d]);
    squares += x * x;
  }
  const float query_inverse = inverse_of_norm(block_sum(squares, memory.scratch));
  for (int i = threadIdx.x; i < (p.k + 1) * stride; i += kTileThreads) memory.matrix[i] = 0.0f;

  float along = 0.0f, own_dots = 0.0f;
  for (int begin = 0; begin < p.num_pairs; begin += kTileThreads) {
    __syncthreads();
    const int at = begin + threadIdx.x, count = min(kTileThreads, p.num_pairs - begin);
    if (at < p.num_pairs) {
      const Pair pair(p, row, at);
      const int64_t place = int64_t(row) * p.num_pairs + at;
      const float upstream = g.cosine_grad[place], pull = upstream * p.inverse_norm[place];
      memory.first[threadIdx.x] = pair.first, memory.second[threadIdx.x] = pair.second;
      memory.pull[threadIdx.x] = pull, memory.curvature[threadIdx.x] = pull * p.cosine[place] * p.inverse_norm[place];
      own_dots += upstream * p.cosine[place];
    }
    __syncthreads();
    for (int i = 0; c < p.k && i < count; ++i) {
      const int a = memory.first[i], b = memory.second[i];
      const float weight = (a == c ? alpha : 0.0f) + (b == c ? beta : 0.0f);
      if (a != c && b != c) continue;
      along += weight * memory.pull[i];
      column[a * stride] -= weight * alpha * memory.curvature[i];
      column[b * stride] -= weight * beta * memory.curvature[i];
    }
  }
  const float dot = block_sum(own_dots, memory.scratch);  // of the query's unit vector and its gradient
  if (c < p.k) column[p.k * stride] = memory.matrix[c * stride + p.k] = along * query_inverse;
  if (c == 0) memory.matrix[p.k * stride + p.k] = has_constant_norm(query_inverse) ? 0.0f : -dot * query_inverse * query_inverse;
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads) mixture_gradient_kernel(MixedNegatives p, MixtureGradients g) {
  constexpr int kGroupsAtATime = kTileThreads / kDepth<T>;
  const int row = g.first + blockIdx.x;
  const MixtureGradientMemory<T> memory(p.k);
  Gathered<T> gathered(p, row, memory.stages, memory.chosen);
  make_matrix(p, g, row, gathered, memory);

  const int stride = memory.stride(p.k), num_groups = stride / kOutputsAtATime;
  const int first_group = g.addition ? 0 : p.k / kOutputsAtATime;
  for (int step = 0; step < gathered.num_steps(); ++step) {
    const T* x = gathered.wait_for(step) + threadIdx.x % kDepth<T>;
    const int d = step * kDepth<T> + threadIdx.x % kDepth<T>;
    if (d >= p.dim) continue;
    for (int group = first_group + threadIdx.x / kDepth<T>; group < num_groups; group += kGroupsAtATime) {
      float sum[kOutputsAtATime] = {};
      for (int e = 0; e <= p.k; ++e) {
        const float value = to_float(x[e * gathered.kStride]);
        const auto a = *reinterpret_cast<const Vector<float>*>(memory.matrix + e * stride + group * kOutputsAtATime);
#pragma unroll
        for (int v = 0; v < kOutputsAtATime; ++v) sum[v] += a.element[v] * value;
      }
#pragma unroll
      for (int v = 0; v < kOutputsAtATime; ++v) {
        const int c = group * kOutputsAtATime + v;
        if (c < p.k && g.addition) g.addition[(int64_t(blockIdx.x) * p.k + c) * p.dim + d] = sum[v];
        if (c == p.k && g.query_grad) g.query_grad[int64_t(row) * p.dim + d] = sum[v];
      }
    }
  }
}

// A row of the bank and two dimensions a thread: the additions that are for it, in order.
constexpr int kJoinDims = 2 * kTileThreads, kJoinWarps = kTileThreads / kWarp;
constexpr int kLookedThrough = 256;  // entries of index, by a warp at a time

constexpr int join_slices(int dim) { return (dim + kJoinDims - 1) / kJoinDims; }
constexpr size_t kJoinShared = (kJoinWarps * kLookedThrough + kJoinWarps) * sizeof(int);

// Where the row of the bank is among a warp's kLookedThrough entries of index, from `begin` on; how many those are.
__device__ __forceinline__ int find_entries(const int64_t* index, int begin, int end, int bank_row, int* list) {
  const int lane = threadIdx.x % kWarp;
  int found = 0;
#pragma unroll 4
  for (int i = 0; i < kLookedThrough; i += kWarp) {
    const int at = begin + i + lane;
    const bool is_hit = at < end && index[at] == bank_row;
    const unsigned hits = __ballot_sync(kAllLanes, is_hit);
    if (is_hit) list[found + __popc(hits & ((1u << lane) - 1u))] = at;
    found += __popc(hits);
  }
  return found;
}

__global__ void __launch_bounds__(kTileThreads) join_additions_kernel(MixedNegatives p, MixtureGradients g) {
  const int slices = join_slices(p.dim), bank_row = blockIdx.x / slices;
  const int first_dim = blockIdx.x % slices * kJoinDims + threadIdx.x, warp = threadIdx.x / kWarp;
  const int64_t* index = p.index + int64_t(g.first) * p.k;
  const int num_entries = g.count * p.k;
  int* list = dynamic_shared<int>();
  int* found = list + kJoinWarps * kLookedThrough;
  float sum[2] = {};
  for (int begin = 0; begin < num_entries; begin += kJoinWarps * kLookedThrough) {
    int* own_list = list + warp * kLookedThrough;
    const int own_found = find_entries(index, begin + warp * kLookedThrough, num_entries, bank_row, own_list);
    if (threadIdx.x % kWarp == 0) found[warp] = own_found;
    __syncthreads();
    for (int w = 0; w < kJoinWarps; ++w)
#pragma unroll 4
      for (int i = 0; i < found[w]; ++i) {
        const float* addition = g.addition + int64_t(list[w * kLookedThrough + i]) * p.dim;
#pragma unroll
        for (int v = 0; v < 2; ++v)
          if (first_dim + v * kTileThreads < p.dim) sum[v] += addition[first_dim + v * kTileThreads];
      }
    __syncthreads();
  }
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const int d = first_dim + v * kTileThreads;
    if (d >= p.dim) continue;
    float* out = g.bank_grad + int64_t(bank_row) * p.dim + d;
    *out = g.first ? *out + sum[v] : sum[v];
  }
}

}  // namespace hicl::cuda
