// The three products of a block: similarities, and with what the rows made of them the gradients.
#pragma once
#include "info_nce_sweep.h"

namespace hicl {

// logits(r) = q̂_i · k_j for the block's rows and all columns that are similarities
template <typename T>
void Sweep<T>::similarities(int64_t first, int64_t count) {
  each_block_row(count, [&](int64_t r, T* unit_query) {
    k_.scale(unit_query_.row(first + r), unit_query_.factor(first + r), unit_query, query_.columns);
  });
  if (mixing_) key_similarities(count);  // wider than the keys where they are few: before the other columns
  for (const Segment<T>& s : segments_) {
    if (s.unit.count() == 0 || (mixing_ && s.first == 0)) continue;
    const Matrix<const T> columns{s.unit.row(0), s.unit.count(), query_.columns, query_.columns};
    matmul(columns_of(s, count), unit_block(count), columns.transposed());
  }
  block_first_ = first;
}

// As `hard_negatives` takes them, so that the same keys are chosen.
template <typename T>
void Sweep<T>::key_similarities(int64_t count) {
  const int64_t d = query_.columns;
  const Matrix<T> queries = unit_block_.filled_up(count);
  const UnitRows<T>& keys = segments_[0].unit;
  const Chunks chunks = key_chunks();
  for (int64_t column = 0; column < keys.count(); column += chunks.width()) {
    const int64_t begin = chunks.begin(column), end = chunks.end(column);
    multiply_chunk(logits_.part(queries.rows, begin, chunks.width()), queries,
                   Matrix<const T>{keys.row(begin), end - begin, d, d}, chunks.width(), padded_keys_);
  }
}

// dQ = A K and dK = Aᵀ Q̂ with A = ∂loss/∂(k_j · q̂) of the block, which is row_factor times what `logits` holds.
// The positives' entries are added apart, in full precision.
template <typename T>
void Sweep<T>::products(int64_t first, int64_t count) {
  const int64_t d = query_.columns;
  if (out_.query_gradient) {
    T* gradient = out_.query_gradient + first * d;
    bool accumulate = false;
    for (const Segment<T>& s : segments_) {
      if (s.unit.count() == 0) continue;
      matmul(Matrix<T>{gradient, count, d, d}, columns_of(s, count), Matrix<const T>{s.unit.row(0), s.unit.count(), d, d},
             accumulate);
      accumulate = true;
    }
    finish_query_gradient(first, count, gradient);
  }
  if (!wanted_.key && !wanted_.negatives) return;
  each_block_row(count, [&](int64_t r, T* unit_query) { k_.scale(unit_query, row_factor_[r], unit_query, d); });
  for (const Segment<T>& s : segments_)
    if (s.gradient && s.unit.count())
      matmul(Matrix<T>{s.gradient, s.unit.count(), d, d}, columns_of(s, count).transposed(), unit_block(count), first > 0);
  if (!wanted_.key) return;
  add_positives(first, count, segments_[0].gradient);
  if (mixing_) mixing_->add_to(segments_[0].gradient, first, first + count);
}

// Adds the positive's part and goes through the normalisation.
template <typename T>
void Sweep<T>::finish_query_gradient(int64_t first, int64_t count, T* query_gradient) {
  const int64_t d = query_.columns;
  const UnitRows<T>& keys = segments_[0].unit;
  each_block_row(count, [&](int64_t r, const T* unit_query) {
    const int64_t i = first + r, j = target(i);
    T* gradient = query_gradient + r * d;
    const double along = double(k_.dot(unit_query, gradient, d)) + positive_entry_[r] * double(out_.positive[i]);
    const double factor = double(unit_query_.factor(i)) * double(row_factor_[r]);
    const double radial = unit_query_.has_constant_norm(i) ? 0.0 : -along;
    k_.combine(gradient, T(factor), T(factor * positive_entry_[r]) * keys.factor(j), keys.row(j), T(factor * radial),
               unit_query, d);
    if (unit_query_.shrink(i) != 1) k_.scale(gradient, unit_query_.shrink(i), gradient, d);
  });
}

// Several rows may share a positive, so threads share out the dimensions and not the rows.
template <typename T>
void Sweep<T>::add_positives(int64_t first, int64_t count, T* key_gradient) {
  const int64_t d = query_.columns;
  const UnitRows<T>& keys = segments_[0].unit;
  torch::stable::parallel_for(0, d, std::max<int64_t>(16, kGrain / count), [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t j = target(first + r);
      k_.add_scaled(unit_block_.row(r) + begin, T(positive_entry_[r]) * keys.factor(j),
                    key_gradient + j * d + begin, end - begin);
    }
  });
}

template <typename T>
void Sweep<T>::finish_gradients() {
  for (const Segment<T>& s : segments_)
    if (s.gradient) s.unit.project_all(s.gradient, mixing_ && s.first == 0 ? mixing_->kept() : nullptr);
  if (out_.scale_gradient) {
    double total = 0;
    for (const double m : moment_) total += m;
    *out_.scale_gradient = T(total / rules_.scale);
  }
}

}  // namespace hicl
