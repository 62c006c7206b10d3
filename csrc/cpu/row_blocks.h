// Rows taken a block at a time: how many, and the memory that they are worked on in.
//
// Every block is a multiple of some number of rows, and so is the memory for it. So a product whose rows are filled up to
// that multiple, for the sake of equal_products.h, stays inside, in the last block as in any other.
#pragma once
#include <algorithm>
#include <cstdint>

#include "equal_products.h"
#include "matmul.h"
#include "memory.h"

namespace hicl {

constexpr int64_t kBlockBytes = 128 << 20;  // of a block's similarities or logits, where a call doesn't say otherwise
constexpr int64_t kMostBlockRows = 1024;    // the BLAS packs the other operand anew for every block: so many pay for it

// As many rows as the bytes have room for, at most `most`, at least one multiple.
class RowBlocks {
 public:
  RowBlocks(int64_t num_rows, int64_t row_bytes, int64_t bytes, int64_t most, int64_t multiple = kRowMultiple)
      : num_rows_(num_rows),
        rows_(std::max(multiple, std::min({rounded_up(num_rows, multiple), bytes / row_bytes, most}) / multiple * multiple)) {}

  int64_t rows() const { return rows_; }  // of every block but the last, which may have fewer
  int64_t num_rows() const { return num_rows_; }

  // Calls f(first, count) for each block.
  template <typename F>
  void each(F f) const {
    for (int64_t first = 0; first < num_rows_; first += rows_) f(first, std::min(rows_, num_rows_ - first));
  }

 private:
  int64_t num_rows_, rows_;
};

// An odd number of cache lines: rows a power of two apart would fall into the same few lines of the cache.
template <typename T>
constexpr int64_t row_stride_for(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((columns + kLine - 1) / kLine | 1) * kLine;
}

// Memory for the rows of a block, (R, stride), in a workspace.
template <typename T>
class BlockRows {
 public:
  BlockRows() = default;
  BlockRows(const RowBlocks& blocks, int64_t stride, Workspace& workspace)
      : data_(workspace.take<T>(blocks.rows() * stride)), stride_(stride) {}
  static int64_t bytes(const RowBlocks& blocks, int64_t stride) { return Workspace::bytes_of<T>(blocks.rows() * stride); }

  T* row(int64_t r) const { return data_ + r * stride_; }
  int64_t stride() const { return stride_; }
  // Columns first:first + columns of the first `rows` rows
  Matrix<T> part(int64_t rows, int64_t first, int64_t columns) const { return {data_ + first, rows, columns, stride_}; }

  // `count` rows, and zero rows after them up to a multiple of kRowMultiple.
  Matrix<T> filled_up(int64_t count) const {
    const int64_t rows = rounded_up(count, kRowMultiple);
    std::fill(row(count), row(rows), T(0));
    return part(rows, 0, stride_);
  }

 private:
  T* data_ = nullptr;
  int64_t stride_ = 0;
};

}  // namespace hicl
