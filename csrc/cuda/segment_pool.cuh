// Ragged weighted pooling: H_b = Σ_j w_j h_j / Σ_j w_j over the segments of sequence b, and its gradients.
//
// The segments, not the sequences, are shared out: a warp walks through `chunk` segments in a row and a slice of their
// dimensions, and meets sequences as they come. So one long sequence keeps as many warps busy as many short ones. What a
// chunk has of a sequence that goes beyond it is left as a part; a second kernel adds a sequence's parts in order: no
// atomics, the same bits every time. Walks touch every segment once, 16 bytes a lane.
#pragma once
#include "platform.cuh"
#include "segment_pool.h"

namespace hicl::cuda {

constexpr int kPoolThreads = 128;

// The dimensions that a lane holds: neighbours where a row can be read by 16 bytes, else every 32nd.
template <typename T, bool kAligned>
struct Slice {
  static constexpr int kSize = Vector<T>::kSize, kWidth = kSize * kWarp;
  int64_t first, dim;

  __device__ __forceinline__ Slice(int64_t slice, int lane, int64_t dim)
      : first(slice * kWidth + (kAligned ? lane * kSize : lane)), dim(dim) {}
  __device__ __forceinline__ int64_t at(int v) const { return first + (kAligned ? v : v * kWarp); }

  template <typename Row>
  __device__ __forceinline__ void load(const Row* row, float (&x)[kSize]) const {
    if constexpr (kAligned) {
      Vector<Row> packed{};
      if (first < dim) packed = *reinterpret_cast<const Vector<Row>*>(row + first);
#pragma unroll
      for (int v = 0; v < kSize; ++v) x[v] = to_float(packed.element[v]);
    } else {
#pragma unroll
      for (int v = 0; v < kSize; ++v) x[v] = at(v) < dim ? to_float(row[at(v)]) : 0.0f;
    }
  }
  __device__ __forceinline__ void store(T* row, const float (&x)[kSize]) const {
    if constexpr (kAligned) {
      Vector<T> packed;
#pragma unroll
      for (int v = 0; v < kSize; ++v) packed.element[v] = rounded<T>(x[v]);
      if (first < dim) *reinterpret_cast<Vector<T>*>(row + first) = packed;
    } else {
#pragma unroll
      for (int v = 0; v < kSize; ++v)
        if (at(v) < dim) row[at(v)] = rounded<T>(x[v]);
    }
  }
  __device__ __forceinline__ void load_sums(const float* row, float (&x)[kSize]) const {
#pragma unroll
    for (int v = 0; v < kSize; ++v) x[v] = at(v) < dim ? row[at(v)] : 0.0f;
  }
  __device__ __forceinline__ void store_sums(float* row, const float (&x)[kSize]) const {
#pragma unroll
    for (int v = 0; v < kSize; ++v)
      if (at(v) < dim) row[at(v)] = x[v];
  }
};

template <typename T>
inline int64_t num_slices(int64_t dim) {
  constexpr int64_t kWidth = Vector<T>::kSize * kWarp;
  return dim > kWidth ? (dim + kWidth - 1) / kWidth : 1;
}

// Which chunk and which slice this warp has.
struct Share {
  int64_t chunk, slice, begin, end;

  __device__ __forceinline__ Share(const Ragged& r, int64_t slices) {
    const int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    chunk = warp / slices, slice = warp % slices;
    begin = chunk * r.chunk;
    end = begin + r.chunk < r.num_segments ? begin + r.chunk : r.num_segments;
  }
};

__device__ __forceinline__ float weight_of(const Ragged& r, int64_t segment) {
  return r.weights ? r.weights[segment] : 1.0f;
}

// The last sequence that begins at or before the segment.
__device__ __forceinline__ int64_t sequence_of(const Ragged& r, int64_t segment) {
  int64_t low = 0, high = r.num_sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (r.offsets[middle] <= segment)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Calls piece(b, begin, end) for what the chunk has of each sequence, in order. Empty sequences belong to the chunk that
// ends where they are.
template <typename F>
__device__ __forceinline__ void each_piece(const Ragged& r, const Share& share, F piece) {
  int64_t b = share.chunk == 0 ? 0 : sequence_of(r, share.begin), at = share.begin;
  for (; b < r.num_sequences && (at < share.end || r.offsets[b] <= share.end); ++b) {
    const int64_t sequence_end = r.offsets[b + 1];
    if (sequence_end > share.end && r.offsets[b] >= share.end) break;  // begins in the next chunk
    const int64_t end = sequence_end < share.end ? sequence_end : share.end;
    piece(b, at, end);
    at = end > at ? end : at;
    if (sequence_end > share.end) break;
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void write_pooled(const Ragged& r, const PoolBuffers& out, const Slice<T, kAligned>& slice,
                                             bool is_first_slice, int64_t b, float (&sum)[Slice<T, kAligned>::kSize],
                                             float weight) {
  const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
#pragma unroll
  for (int v = 0; v < slice.kSize; ++v) sum[v] *= inverse;
  if (r.dim > 0) slice.store(static_cast<T*>(out.pooled) + b * r.dim, sum);
  if (out.inverse_total && is_first_slice && threadIdx.x % kWarp == 0) out.inverse_total[b] = inverse;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads, 4) pool_kernel(Ragged r, PoolBuffers buffers, int64_t slices) {
  using Lane = Slice<T, kAligned>;
  const Share share(r, slices);
  if (share.begin >= r.num_segments) return;
  const int lane = threadIdx.x % kWarp;
  const Lane slice(share.slice, lane, r.dim);
  const T* segments = static_cast<const T*>(buffers.segments);
  each_piece(r, share, [&](int64_t b, int64_t begin, int64_t end) {
    float sum[Lane::kSize] = {}, weight = 0.0f;
#pragma unroll 4
    for (int64_t j = begin; j < end; ++j) {
      const float w = weight_of(r, j);
      weight += w;
      if (r.dim > 0) {
        float h[Lane::kSize];
        slice.load(segments + j * r.dim, h);
#pragma unroll
        for (int v = 0; v < Lane::kSize; ++v) sum[v] += w * h[v];
      }
    }
    const bool begins_before = r.offsets[b] < share.begin;
    if (!begins_before && r.offsets[b + 1] <= share.end) {
      write_pooled<T>(r, buffers, slice, share.slice == 0, b, sum, weight);
      return;
    }
    const int64_t part = 2 * share.chunk + (begins_before ? 0 : 1);
    slice.store_sums(buffers.part + part * r.dim, sum);
    if (share.slice == 0 && lane == 0) buffers.part_weight[part] = weight;
  });
}

// A sequence that a chunk's end cuts: its parts, in order. The chunk in which it begins does it.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads, 4) join_kernel(Ragged r, PoolBuffers buffers, int64_t slices) {
  using Lane = Slice<T, kAligned>;
  const Share share(r, slices);
  if (share.end >= r.num_segments) return;
  const int64_t b = sequence_of(r, share.end - 1), sequence_end = r.offsets[b + 1];
  if (r.offsets[b] < share.begin || sequence_end <= share.end) return;
  const Lane slice(share.slice, threadIdx.x % kWarp, r.dim);
  const int64_t last = ((sequence_end < r.num_segments ? sequence_end : r.num_segments) - 1) / r.chunk;
  float sum[Lane::kSize], weight = buffers.part_weight[2 * share.chunk + 1];
  slice.load_sums(buffers.part + (2 * share.chunk + 1) * r.dim, sum);
#pragma unroll 4
  for (int64_t chunk = share.chunk + 1; chunk <= last; ++chunk) {
    float more[Lane::kSize];
    slice.load_sums(buffers.part + 2 * chunk * r.dim, more);
    weight += buffers.part_weight[2 * chunk];
#pragma unroll
    for (int v = 0; v < Lane::kSize; ++v) sum[v] += more[v];
  }
  write_pooled<T>(r, buffers, slice, share.slice == 0, b, sum, weight);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads, 4)
    segment_dots_kernel(Ragged r, const T* segments, const T* pooled_grad, float* dot) {
  using Lane = Slice<T, kAligned>;
  const Share share(r, 1);
  if (share.begin >= r.num_segments) return;
  const int lane = threadIdx.x % kWarp;
  each_piece(r, share, [&](int64_t b, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float sum = 0.0f;
      for (int64_t at = 0; at * Lane::kWidth < r.dim; ++at) {
        const Lane slice(at, lane, r.dim);
        float h[Lane::kSize], g[Lane::kSize];
        slice.load(segments + j * r.dim, h);
        slice.load(pooled_grad + b * r.dim, g);
#pragma unroll
        for (int v = 0; v < Lane::kSize; ++v) sum += g[v] * h[v];
      }
      sum = warp_sum(sum);
      if (lane == 0) dot[j] = sum;
    }
  });
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads, 4) spread_kernel(Ragged r, SpreadBuffers buffers, int64_t slices) {
  using Lane = Slice<T, kAligned>;
  const Share share(r, slices);
  if (share.begin >= r.num_segments) return;
  const int lane = threadIdx.x % kWarp;
  const Lane slice(share.slice, lane, r.dim);
  each_piece(r, share, [&](int64_t b, int64_t begin, int64_t end) {
    const float inverse = buffers.inverse_total[b];
    if (buffers.weights_grad && share.slice == 0) {
      const float mean = buffers.mean_dot[b];
      for (int64_t j = begin + lane; j < end; j += kWarp) buffers.weights_grad[j] = (buffers.dot[j] - mean) * inverse;
    }
    if (!buffers.segments_grad) return;
    float g[Lane::kSize];
    slice.load(static_cast<const T*>(buffers.pooled_grad) + b * r.dim, g);
    for (int64_t j = begin; j < end; ++j) {
      const float part = weight_of(r, j) * inverse;
      float h_grad[Lane::kSize];
#pragma unroll
      for (int v = 0; v < Lane::kSize; ++v) h_grad[v] = part * g[v];
      slice.store(static_cast<T*>(buffers.segments_grad) + j * r.dim, h_grad);
    }
  });
}

}  // namespace hicl::cuda
