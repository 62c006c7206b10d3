// What InfoNCE's large-batch path does row by row: norms and unit rows, the positives' cosines, and the way back through
// the normalisation.
//
// A warp takes a row of up to 1024 dimensions, a block of four warps a longer one, 4096 dimensions at a time. Threads keep
// what they have read, 16 bytes at a time, until the row's sum is known: every operand is read once. Rows longer than 4096
// are read twice, the second time from cache.
#pragma once
#include "norm.cuh"
#include "rows.h"
#include "tile_product.cuh"

namespace hicl::cuda {

constexpr int kRowThreads = kTileThreads;  // over which block_sum sums
constexpr int kHeld = 32;                  // elements of a row that a thread keeps

// The part of a row that its kThreads threads have at a time; a thread's elements are neighbours where rows can be read by
// 16 bytes, else every kThreads-th.
template <typename T, bool kAligned, int kThreads>
struct Stretch {
  using Type = T;
  static constexpr int kWidth = kHeld * kThreads, kRowsPerBlock = kRowThreads / kThreads;
  static constexpr int kSize = Vector<T>::kSize;
  int64_t dim, begin;

  __device__ __forceinline__ explicit Stretch(int64_t dim) : dim(dim), begin(0) {}
  __device__ __forceinline__ bool is_inside() const { return begin < dim; }
  __device__ __forceinline__ void advance() { begin += kWidth; }
  // Whether a row is one stretch: what was read of it is then still there.
  __device__ __forceinline__ bool is_all() const { return dim <= kWidth; }

  // `row` is of T, or of float32.
  template <typename Element>
  __device__ __forceinline__ void load(const Element* row, float (&x)[kHeld]) const {
#pragma unroll
    for (int h = 0; h < kHeld; h += kStep<Element>) {
      if constexpr (kAligned) {
        Vector<Element> packed{};
        if (at(h) < dim) packed = *reinterpret_cast<const Vector<Element>*>(row + at(h));
#pragma unroll
        for (int v = 0; v < kStep<Element>; ++v) x[h + v] = to_float(packed.element[v]);
      } else {
        x[h] = at(h) < dim ? to_float(row[at(h)]) : 0.0f;
      }
    }
  }
  template <typename Element>
  __device__ __forceinline__ void store(Element* row, const float (&x)[kHeld]) const {
#pragma unroll
    for (int h = 0; h < kHeld; h += kStep<Element>) {
      if (at(h) >= dim) continue;
      if constexpr (kAligned) {
        Vector<Element> packed;
#pragma unroll
        for (int v = 0; v < kStep<Element>; ++v) packed.element[v] = rounded<Element>(x[h + v]);
        *reinterpret_cast<Vector<Element>*>(row + at(h)) = packed;
      } else {
        row[at(h)] = rounded<Element>(x[h]);
      }
    }
  }

 private:
  // How many elements one access moves.
  template <typename Element>
  static constexpr int kStep = kAligned ? Vector<Element>::kSize : 1;

  // Where a thread's element h is. Vectors of T lie side by side; of float32 beside 16-bit T, in halves.
  __device__ __forceinline__ int64_t at(int h) const {
    const int thread = threadIdx.x % kThreads;
    return begin + (kAligned ? (h / kSize * kThreads + thread) * kSize + h % kSize : h * kThreads + thread);
  }
};

template <typename Part>
__device__ __forceinline__ int64_t row_of_thread() {
  constexpr int kThreads = kRowThreads / Part::kRowsPerBlock;
  return int64_t(blockIdx.x) * Part::kRowsPerBlock + threadIdx.x / kThreads;
}
template <typename Part>
__device__ __forceinline__ bool is_first_of_row() {
  return threadIdx.x % (kRowThreads / Part::kRowsPerBlock) == 0;
}
// Over the row's threads, which all get it.
template <typename Part>
__device__ __forceinline__ float row_sum(float x) {
  if constexpr (Part::kRowsPerBlock > 1) {
    return warp_sum(x);
  } else {
    return block_sum(x, dynamic_shared<float>());
  }
}

// Four sums side by side: shorter chains of additions, and less rounding.
__device__ __forceinline__ float dot_of(const float (&a)[kHeld], const float (&b)[kHeld]) {
  float sum[4] = {};
#pragma unroll
  for (int h = 0; h < kHeld; ++h) sum[h % 4] += a[h] * b[h];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
__device__ __forceinline__ void scale_by(float (&x)[kHeld], float factor) {
#pragma unroll
  for (int h = 0; h < kHeld; ++h) x[h] *= factor;
}
__device__ __forceinline__ void add_scaled(float (&x)[kHeld], const float (&y)[kHeld], float factor) {
#pragma unroll
  for (int h = 0; h < kHeld; ++h) x[h] += factor * y[h];
}

template <typename Part>
__global__ void __launch_bounds__(kRowThreads, 4) normalise_kernel(RowShape shape, NormaliseBuffers b) {
  using T = typename Part::Type;
  const int64_t row = row_of_thread<Part>(), first = row * shape.dim;
  if (row >= shape.num_rows) return;
  const T* x = static_cast<const T*>(b.x) + first;
  float held[kHeld], squares = 0.0f;
  for (Part part(shape.dim); part.is_inside(); part.advance()) {
    part.load(x, held);
    squares += dot_of(held, held);
  }
  squares = row_sum<Part>(squares);
  float inverse = inverse_of_norm(squares, b.floor);
  if (squares == 0.0f) {  // of a zero row, or of one so short that its squares vanish
    float magnitude = 0.0f;
    for (Part part(shape.dim); part.is_inside(); part.advance()) {
      if (!part.is_all()) part.load(x, held);
#pragma unroll
      for (int h = 0; h < kHeld; ++h) magnitude += fabsf(held[h]);
    }
    inverse = row_sum<Part>(magnitude) == 0.0f ? 0.0f : 1.0f / b.floor;
  }
  if (is_first_of_row<Part>()) b.inverse[row] = inverse;
  if (!b.unit) return;
  for (Part part(shape.dim); part.is_inside(); part.advance()) {
    if (!part.is_all()) part.load(x, held);
    scale_by(held, inverse);
    part.store(static_cast<T*>(b.unit) + first, held);
  }
}

template <typename Part>
__global__ void __launch_bounds__(kRowThreads, 4)
    scale_rows_kernel(RowShape shape, const typename Part::Type* x, const float* factor, typename Part::Type* scaled) {
  const int64_t row = row_of_thread<Part>(), first = row * shape.dim;
  if (row >= shape.num_rows) return;
  const float of_row = factor[row];
  for (Part part(shape.dim); part.is_inside(); part.advance()) {
    float held[kHeld];
    part.load(x + first, held);
    scale_by(held, of_row);
    part.store(scaled + first, held);
  }
}

template <typename Part>
__global__ void __launch_bounds__(kRowThreads, 4) positive_kernel(RowShape shape, PositiveBuffers b) {
  using T = typename Part::Type;
  const int64_t row = row_of_thread<Part>();
  if (row >= shape.num_rows) return;
  const int64_t target = b.target[row];
  if (target < 0 || target >= b.key.num_rows) {
    if (is_first_of_row<Part>()) b.positive[row] = NAN;
    return;
  }
  float sum = 0.0f;
  for (Part part(shape.dim); part.is_inside(); part.advance()) {
    float query[kHeld], key[kHeld];
    part.load(static_cast<const T*>(b.query) + row * shape.dim, query);
    part.load(static_cast<const T*>(b.key.x) + target * shape.dim, key);
    sum += dot_of(query, key);
  }
  sum = row_sum<Part>(sum);
  if (is_first_of_row<Part>()) b.positive[row] = sum * b.query_inverse[row] * b.key.inverse[target];
}

// Calls take(partner, coefficient) for each of the row's partners, in order.
template <typename F>
__device__ __forceinline__ void each_partner(const NormGradientBuffers& b, int64_t row, F take) {
  if (!b.coefficient) return;
  if (b.begin) {
    for (int64_t i = b.begin[row]; i < b.begin[row + 1]; ++i) take(b.partner[i], b.coefficient[b.partner[i]]);
    return;
  }
  const int64_t partner = b.partner ? b.partner[row] : row;
  if (partner >= 0 && partner < b.other.num_rows) take(partner, b.coefficient[row]);
}

// The gradient with respect to the unit row: factor · product and what the partners add.
template <typename Part>
__device__ __forceinline__ void load_unit_gradient(const NormGradientBuffers& b, int64_t row, const Part& part,
                                                   float (&gradient)[kHeld]) {
  using T = typename Part::Type;
  part.load(b.product + row * part.dim, gradient);
  scale_by(gradient, b.factor[row * b.factor_stride]);
  each_partner(b, row, [&](int64_t partner, float coefficient) {
    float other[kHeld];
    part.load(static_cast<const T*>(b.other.x) + partner * part.dim, other);
    add_scaled(gradient, other, coefficient * b.other.inverse[partner]);
  });
}

// (I − x̂ x̂ᵀ) g / ‖x‖
template <typename Part>
__global__ void __launch_bounds__(kRowThreads, 4) norm_gradient_kernel(RowShape shape, NormGradientBuffers b) {
  using T = typename Part::Type;
  const int64_t row = row_of_thread<Part>(), first = row * shape.dim;
  if (row >= shape.num_rows) return;
  const float inverse = b.inverse[row];
  float gradient[kHeld], unit[kHeld], along = 0.0f;
  const auto load = [&](const Part& part) {
    load_unit_gradient(b, row, part, gradient);
    part.load(static_cast<const T*>(b.x) + first, unit);
    scale_by(unit, inverse);
  };
  for (Part part(shape.dim); part.is_inside(); part.advance()) {
    load(part);
    along += dot_of(gradient, unit);
  }
  along = row_sum<Part>(along);
  if (has_constant_norm(inverse, b.floor)) along = 0.0f;  // nothing is taken off along such a row
  for (Part part(shape.dim); part.is_inside(); part.advance()) {
    if (!part.is_all()) load(part);
    add_scaled(gradient, unit, -along);
    scale_by(gradient, inverse);
    part.store(b.gradient + first, gradient);
  }
}

}  // namespace hicl::cuda
