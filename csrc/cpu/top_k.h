// The k largest numbers of a row, and where they stand.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "rows.h"

namespace hicl {

template <typename T>
struct Entry {
  T value;
  int64_t column;
};

// The order of the result: larger values first, NaN before numbers, equal values by lower column.
struct Precedes {
  template <typename T>
  bool operator()(const Entry<T>& a, const Entry<T>& b) const {
    if (a.value > b.value) return true;
    if (a.value < b.value) return false;
    const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
    return a_is_nan != b_is_nan ? a_is_nan : a.column < b.column;
  }
};

// Takes a row in pieces, columns in rising order. A value of −inf is no candidate.
//
// Values above a threshold that the k-th best can't be below are put in a buffer of 2k. When it is full, the better half
// stays and the threshold rises. The first threshold comes from the maxima of 2k disjoint parts of the row: the k-th
// largest maximum, since k values are at least as large. In a row in random order some 1.4k values are, so that nearly
// all of the work is to compare the row with the threshold.
template <typename T>
class TopK {
 public:
  explicit TopK(int64_t k) : k_(k), parts_(std::max(kLeastParts, 2 * k)), buffer_(2 * k + kStep) {}

  void clear() {
    count_ = 0;
    threshold_ = kNothing;
  }
  void offer(const T* row, int64_t first_column, int64_t n) {
    if (threshold_ == kNothing && n >= 4 * parts_) raise_threshold(row, n);
    int64_t j = 0;
    for (; j + kStride <= n; j += kStride) {
      if (!any_passes<kStride>(row + j)) continue;
      for (int64_t s = j; s < j + kStride; s += kStep)
        if (any_passes<kStep>(row + s)) offer_each(row + s, first_column + s, kStep);
    }
    for (; j < n; j += kStep) offer_each(row + j, first_column + j, std::min(kStep, n - j));
  }
  // The best min(k, candidates), in order; −inf and −1 in the places that are left over.
  void take(T* value, int64_t* column) {
    keep_best();
    std::sort(buffer_.begin(), buffer_.begin() + count_, Precedes());
    for (int64_t r = 0; r < k_; ++r) {
      const bool exists = r < count_;
      value[r] = exists ? buffer_[r].value : kNothing;
      column[r] = exists ? buffer_[r].column : -1;
    }
    clear();
  }

 private:
  static constexpr T kNothing = -std::numeric_limits<T>::infinity();
  static constexpr int64_t kStride = 64, kStep = 16, kLeastParts = 32;

  void raise_threshold(const T* row, int64_t n) {
    most_.assign(row, row + parts_);
    for (int64_t j = parts_; j + parts_ <= n; j += parts_) row_kernels<T>().column_max(row + j, most_.data(), parts_);
    for (T& most : most_)
      if (most != most) most = std::numeric_limits<T>::infinity();
    std::nth_element(most_.begin(), most_.begin() + (k_ - 1), most_.end(), std::greater<T>());
    // What equals the k-th largest must pass as well.
    using Limits = std::numeric_limits<T>;
    const T least = std::min(most_[k_ - 1], Limits::max());
    threshold_ = least - std::max(std::abs(least) * Limits::epsilon(), Limits::min());
  }

  // A later value that is equal to the threshold loses by its column. NaN passes, until the k best are all NaN.
  bool passes(T value) const { return !(value <= threshold_); }
  template <int64_t kCount>
  bool any_passes(const T* values) const {
    const T threshold = threshold_;
    int any = 0;  // no branch: the compiler makes vectors of this loop
    for (int64_t i = 0; i < kCount; ++i) any |= !(values[i] <= threshold);
    return any;
  }
  // At most kStep values. Each is written, and the place of one that doesn't pass is written again: there is no telling
  // which will pass, and a wrong guess of the processor's costs more than a store.
  void offer_each(const T* values, int64_t first_column, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      buffer_[count_] = {values[i], first_column + i};
      count_ += passes(values[i]);
    }
    if (count_ >= 2 * k_) keep_best();
  }
  void keep_best() {
    if (count_ < k_) return;
    std::nth_element(buffer_.begin(), buffer_.begin() + (k_ - 1), buffer_.begin() + count_, Precedes());
    count_ = k_;
    const T worst = buffer_[k_ - 1].value;
    threshold_ = worst == worst ? worst : std::numeric_limits<T>::infinity();
  }

  int64_t k_, parts_;
  T threshold_ = kNothing;
  std::vector<Entry<T>> buffer_;  // the first `count_` are in use
  int64_t count_ = 0;
  std::vector<T> most_;
};

}  // namespace hicl
