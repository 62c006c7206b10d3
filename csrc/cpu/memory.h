// Memory for the length of a call.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "sanitizer.h"

namespace hicl {

// Uninitialised memory for one call. One block of up to kKept bytes stays with the process and serves the next call:
// where memory is fresh, the system's clearing of its pages takes a tenth of the time of a batch of 4096.
//
// The kept block lies behind one atomic pointer: there is no lock that a process could be forked with.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : block_(kSanitizing ? nullptr : kept().exchange(nullptr)), bytes_(bytes) {
    if (!kSanitizing && (!block_ || block_->bytes < bytes)) block_ = Block::of(bytes);
  }
  ~Workspace() {
    if (block_ && block_->bytes <= kKept) block_.reset(kept().exchange(block_.release()));
  }
  Workspace(const Workspace&) = delete;

  template <typename T>
  T* take(int64_t count) {
    const int64_t first = used_;
    used_ += bytes_of<T>(count);
    if (used_ > bytes_) throw std::logic_error("hicl_fast: more of a workspace was taken than it was made for");
    return reinterpret_cast<T*>(kSanitizing ? alone(count * int64_t(sizeof(T))) : block_->data() + first);
  }
  // What `take` uses up: whole cache lines.
  template <typename T>
  static int64_t bytes_of(int64_t count) {
    return (count * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr int64_t kLine = 64, kKept = 64 << 20;

  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kLine)); }
  };
  // Its size, in a cache line, with the memory after it.
  struct Block {
    int64_t bytes;

    char* data() { return reinterpret_cast<char*>(this) + kLine; }
    static std::unique_ptr<Block, Free> of(int64_t bytes) {
      return std::unique_ptr<Block, Free>(new (::operator new(kLine + bytes, std::align_val_t(kLine))) Block{bytes});
    }
  };
  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }
  // Memory of its own, no byte longer, so that the sanitizer knows where it ends.
  char* alone(int64_t bytes) {
    alone_.emplace_back(static_cast<char*>(::operator new(bytes, std::align_val_t(kLine))));
    return alone_.back().get();
  }

  std::unique_ptr<Block, Free> block_;
  std::vector<std::unique_ptr<char, Free>> alone_;
  int64_t bytes_, used_ = 0;
};

}  // namespace hicl
