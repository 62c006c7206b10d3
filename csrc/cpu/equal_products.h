// Products in which equal keys come out equal in every bit, wherever they lie: what ties in a selection rest on.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "matmul.h"

namespace hicl {

// Products of these multiples, all of one width, are such: a BLAS treats what is left over at the edges of its tiles, and
// single rows, with code of their own. Its tiles are 12 or 24 doubles wide on some processors.
constexpr int64_t kRowMultiple = 8;
template <typename T>
constexpr int64_t kColumnMultiple = sizeof(T) == 8 ? 192 : 64;

inline int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Columns 0 to M in chunks of one width; the last is moved back to end where the columns end.
class Chunks {
 public:
  Chunks(int64_t num_columns, int64_t multiple, int64_t most) : num_columns_(num_columns) {
    const bool fits = num_columns <= most && (num_columns % multiple == 0 || num_columns < multiple);
    const int64_t parts = fits ? 1 : std::max<int64_t>(2, (num_columns + most - 1) / most);
    width_ = rounded_up((num_columns + parts - 1) / parts, multiple);
  }
  int64_t width() const { return width_; }
  int64_t begin(int64_t first) const { return std::max<int64_t>(0, std::min(first, num_columns_ - width_)); }
  int64_t end(int64_t first) const { return std::min(first + width_, num_columns_); }

 private:
  int64_t num_columns_, width_;
};

// out (R, chunk width) = queries · keys, for a chunk of keys (C, D). R must be a multiple of kRowMultiple. Where there are
// fewer keys than the narrowest chunk is wide, `padded` holds them and the columns beyond them come out 0.
template <typename T>
void multiply_chunk(Matrix<T> out, const Matrix<T>& queries, Matrix<const T> keys, int64_t width, std::vector<T>& padded) {
  if (keys.rows < width) {
    padded.assign(width * keys.columns, T(0));
    std::copy(keys.data, keys.data + keys.rows * keys.columns, padded.begin());
    keys.data = padded.data();
  }
  keys.rows = out.columns = width;
  matmul(out, queries, keys.transposed());
}

}  // namespace hicl
