// Memory for the length of a call.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace hicl {

// Uninitialised memory for one call. One block of up to kKept bytes stays with the process and serves the next call:
// where memory is fresh, the system's clearing of its pages takes a tenth of the time of a batch of 4096.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex());
    if (kept().bytes >= bytes) std::swap(block_, kept());
    if (!block_.data) block_ = Block(bytes);
  }
  ~Workspace() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (block_.bytes <= kKept && block_.bytes > kept().bytes) std::swap(block_, kept());
  }
  Workspace(const Workspace&) = delete;

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(block_.data.get() + used_);
    used_ += bytes_of<T>(count);
    return taken;
  }
  // What `take` uses up: whole cache lines.
  template <typename T>
  static int64_t bytes_of(int64_t count) {
    return (count * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr int64_t kLine = 64, kKept = 64 << 20;

  struct Block {
    struct Free {
      void operator()(char* data) const { ::operator delete(data, std::align_val_t(kLine)); }
    };
    std::unique_ptr<char, Free> data;
    int64_t bytes = 0;

    Block() = default;
    explicit Block(int64_t size) : data(static_cast<char*>(::operator new(size, std::align_val_t(kLine)))), bytes(size) {}
  };
  static Block& kept() {
    static Block* block = new Block();  // never destroyed: threads may outlive static objects
    return *block;
  }
  static std::mutex& mutex() {
    static std::mutex* mutex = new std::mutex();
    return *mutex;
  }

  Block block_;
  int64_t used_ = 0;
};

}  // namespace hicl
