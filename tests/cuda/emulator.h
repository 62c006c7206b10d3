// Runs the kernels of csrc/cuda on the CPU, for tests of their results: included before them by the compiler's -include.
//
// Every CUDA thread is a fiber with a stack of its own; blocks run one after another. A warp runs as far as it can before
// the next one does, so that a missing barrier gives wrong results instead of passing by luck; HICL_EMULATION_ORDER
// chooses which warp and which lane come first: 0 ascending, 1 descending, other numbers seed a shuffle at every turn.
//
// What it has: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, dynamic shared memory (filled with NaN before every block,
// its end guarded), __syncthreads, warp shuffles and ballots, asynchronous copies that arrive only when they are waited
// for, and m16n8k16 matrix instructions by PTX's tables of fragments. A launch in which threads wait for each other
// without end, or write past their shared memory, returns an error code as a real launch would.
// What it hasn't: more than one block at a time, static shared memory, atomics, races inside a warp, any notion of speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#define HICL_EMULATION 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct Index3 {
  unsigned x;
};

// --- 16-bit types: bits, rounded to nearest even ---------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  if (value != value) return {uint16_t((wide >> 16) | 0x40)};
  return {uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  float size = std::ldexp(float(exponent ? fraction + 1024 : fraction), std::max(exponent, 1) - 25);
  if (exponent == 31) size = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return x.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) return {uint16_t(sign | 0x7e00)};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (size == 0) return {sign};
  const int exponent = std::max(std::ilogb(size), -14);  // subnormals share the lowest exponent
  const int fraction = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024…2048, below it if subnormal
  return {uint16_t(sign | (((exponent + 14) << 10) + fraction))};
}

// --- fibers ----------------------------------------------------------------------------------------------------------

namespace hicl::emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 256;
constexpr uint8_t kGuard = 0xA5;
enum Error { kSuccess = 0, kDeadlock = 1001, kSharedMemoryOverrun = 1002 };

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes, filled;  // zeros beyond the bytes copied
};

struct Thread {
  State state = State::kReady;
  bool is_started = false;
  unsigned index = 0, mask = 0;
  uint64_t given = 0, received[kLanes] = {};
  std::vector<std::vector<Copy>> copies{{}};  // groups; the last is not committed yet
  ucontext_t start;
  jmp_buf resume;

  unsigned lane() const { return index % kLanes; }
};

struct Block {
  std::vector<Thread> threads;
  std::vector<std::vector<char>> stacks;
  std::vector<uint8_t> shared;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
  Thread* current = nullptr;
  jmp_buf scheduler;
  Index3 block_index{}, block_size{}, grid_size{};
};
inline Block& block() {
  static thread_local Block instance;
  return instance;
}

inline void suspend() {
  if (!_setjmp(block().current->resume)) _longjmp(block().scheduler, 1);
}

inline size_t first_of_warp(const Thread& thread) { return thread.index - thread.lane(); }

// Lets a group of lanes go on that all wait with the same mask, each with what the others gave.
inline void release_lanes(size_t first, unsigned mask) {
  std::vector<Thread>& threads = block().threads;
  const size_t end = std::min(first + kLanes, threads.size());
  const auto waits = [&](size_t i) { return threads[i].state == State::kAtWarp && threads[i].mask == mask; };
  for (size_t i = first; i < end; ++i)
    if ((mask >> (i - first) & 1) && threads[i].state != State::kDone && !waits(i)) return;
  uint64_t given[kLanes] = {};
  for (size_t i = first; i < end; ++i) given[i - first] = threads[i].given;
  for (size_t i = first; i < end; ++i)
    if (waits(i)) {
      std::memcpy(threads[i].received, given, sizeof given);
      threads[i].state = State::kReady;
    }
}

// Gives a value to the lanes in the mask, waits for all of them, returns what each of the 32 gave.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
  Thread& self = *block().current;
  self.given = value, self.mask = mask, self.state = State::kAtWarp;
  release_lanes(first_of_warp(self), mask);
  suspend();
  return self.received;
}

inline void run_thread() {
  block().kernel();
  Thread& self = *block().current;
  self.state = State::kDone;
  for (const unsigned mask : [&] {
         std::vector<unsigned> masks;  // lanes that waited for this one
         const size_t first = first_of_warp(self), end = std::min(first + kLanes, block().threads.size());
         for (size_t i = first; i < end; ++i)
           if (block().threads[i].state == State::kAtWarp) masks.push_back(block().threads[i].mask);
         return masks;
       }())
    release_lanes(first_of_warp(self), mask);
  _longjmp(block().scheduler, 1);
}

inline void resume(Thread& thread) {
  block().current = &thread;
  if (_setjmp(block().scheduler)) return;
  if (thread.is_started) _longjmp(thread.resume, 1);
  thread.is_started = true;
  setcontext(&thread.start);
}

class Order {
 public:
  explicit Order(size_t count) : at_(count) {
    const char* asked = std::getenv("HICL_EMULATION_ORDER");
    seed_ = asked ? uint64_t(std::atoi(asked)) : 0;
    state_ = 0x9E3779B97F4A7C15ull * (seed_ + 1);
    std::iota(at_.begin(), at_.end(), size_t(0));
    if (seed_ == 1) std::reverse(at_.begin(), at_.end());
  }
  const std::vector<size_t>& next() {
    for (size_t i = at_.size(); seed_ > 1 && i > 1; --i) {
      state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
      std::swap(at_[i - 1], at_[state_ % i]);
    }
    return at_;
  }

 private:
  std::vector<size_t> at_;
  uint64_t seed_, state_;
};

inline int run_block(Order& warps, Order& lanes) {
  std::vector<Thread>& threads = block().threads;
  for (;;) {
    bool has_run = false;
    for (const size_t warp : warps.next())
      for (bool again = true; again;) {
        again = false;
        for (const size_t lane : lanes.next()) {
          const size_t i = warp * kLanes + lane;
          if (i >= threads.size() || threads[i].state != State::kReady) continue;
          has_run = again = true;
          resume(threads[i]);
        }
      }
    size_t done = 0, at_barrier = 0;
    for (const Thread& thread : threads)
      done += thread.state == State::kDone, at_barrier += thread.state == State::kAtBarrier;
    if (done == threads.size()) return kSuccess;
    if (at_barrier == threads.size()) {  // threads that have ended don't count as arrived
      for (Thread& thread : threads) thread.state = State::kReady;
    } else if (!has_run) {
      return kDeadlock;
    }
  }
}

inline uint8_t* shared_memory() {
  uint8_t* begin = block().shared.data();
  return begin + (128 - reinterpret_cast<uintptr_t>(begin) % 128) % 128;
}

inline int launch(int64_t num_blocks, int num_threads, size_t shared_bytes, std::function<void()> kernel) {
  Block& b = block();
  b.kernel = std::move(kernel);
  b.block_size = {unsigned(num_threads)}, b.grid_size = {unsigned(num_blocks)};
  b.shared.resize(shared_bytes + 128 + kGuardBytes);
  b.shared_bytes = shared_bytes;
  while (b.stacks.size() < size_t(num_threads)) b.stacks.emplace_back(kStackBytes);
  Order warps((num_threads + kLanes - 1) / kLanes), lanes(kLanes);
  for (int64_t index = 0; index < num_blocks; ++index) {
    b.block_index = {unsigned(index)};
    b.threads.assign(num_threads, Thread{});
    std::memset(shared_memory(), 0xFF, shared_bytes);
    std::memset(shared_memory() + shared_bytes, kGuard, kGuardBytes);
    for (int i = 0; i < num_threads; ++i) {
      Thread& thread = b.threads[i];
      thread.index = i;
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = b.stacks[i].data();
      thread.start.uc_stack.ss_size = kStackBytes;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, run_thread, 0);
    }
    if (const int error = run_block(warps, lanes)) return error;
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (shared_memory()[shared_bytes + i] != kGuard) return kSharedMemoryOverrun;
  }
  return kSuccess;
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace hicl::emulation

#define threadIdx (Index3{hicl::emulation::block().current->index})
#define blockIdx (hicl::emulation::block().block_index)
#define blockDim (hicl::emulation::block().block_size)
#define gridDim (hicl::emulation::block().grid_size)

inline void __syncthreads() {
  hicl::emulation::block().current->state = hicl::emulation::State::kAtBarrier;
  hicl::emulation::suspend();
}
inline void __syncwarp(unsigned mask = ~0u) { hicl::emulation::exchange(mask, 0); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  const unsigned lane = hicl::emulation::block().current->lane();
  return hicl::emulation::from_bits<T>(hicl::emulation::exchange(mask, hicl::emulation::to_bits(value))[lane ^ distance]);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return hicl::emulation::from_bits<T>(hicl::emulation::exchange(mask, hicl::emulation::to_bits(value))[lane]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* votes = hicl::emulation::exchange(mask, predicate != 0);
  unsigned result = 0;
  for (int lane = 0; lane < hicl::emulation::kLanes; ++lane)
    if (mask >> lane & 1) result |= unsigned(votes[lane] & 1) << lane;
  return result;
}
using std::min;
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) { return unsigned(hicl::emulation::to_bits(x)); }
inline float __uint_as_float(unsigned bits) { return hicl::emulation::from_bits<float>(bits); }

// --- the platform that csrc/cuda/platform.cuh asks for ---------------------------------------------------------------

namespace hicl::cuda {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t num_blocks, int num_threads, size_t shared_bytes, void* /*stream*/,
           const Arguments&... arguments) {
  return emulation::launch(num_blocks, num_threads, shared_bytes, [&] { kernel(arguments...); });
}

inline const char* error_name(int error) {
  return error == emulation::kDeadlock              ? "threads wait for each other without end"
         : error == emulation::kSharedMemoryOverrun ? "a write past the end of shared memory"
                                                    : "no error";
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_memory());
}

// Copies 16 bytes, the last 16 − filled of them zeros, by the time that they are waited for.
inline void copy_async(void* to, const void* from, int filled) {
  emulation::block().current->copies.back().push_back({to, from, 16, filled});
}
inline void commit_copies() { emulation::block().current->copies.emplace_back(); }
template <int kStillUnderWay>
void wait_for_copies() {
  auto& groups = emulation::block().current->copies;
  while (int(groups.size()) - 1 > kStillUnderWay) {
    for (const emulation::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.filled);
      std::memset(static_cast<char*>(copy.to) + copy.filled, 0, copy.bytes - copy.filled);
    }
    groups.erase(groups.begin());
  }
}

inline float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float value_of(__half x) { return __half2float(x); }

// C (16, 8) += A (16, 16) · B (16, 8), spread over a warp as PTX's mma.m16n8k16 lays it down.
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr unsigned kAll = ~0u;
  uint32_t as[4][emulation::kLanes], bs[2][emulation::kLanes];
  const auto share = [&](uint32_t low, uint32_t high, uint32_t* lows, uint32_t* highs) {
    const uint64_t* given = emulation::exchange(kAll, uint64_t(high) << 32 | low);
    for (int lane = 0; lane < emulation::kLanes; ++lane) lows[lane] = uint32_t(given[lane]), highs[lane] = given[lane] >> 32;
  };
  share(a[0], a[1], as[0], as[1]);
  share(a[2], a[3], as[2], as[3]);
  share(b[0], b[1], bs[0], bs[1]);
  const auto half_of = [](uint32_t pair, int which) { return value_of(T{uint16_t(pair >> (16 * which))}); };
  const int lane = int(emulation::block().current->lane()), group = lane / 4, in_group = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2, column = 2 * in_group + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      c[i] += half_of(as[row_half + 2 * (k / 8)][4 * group + holder], k % 2) * half_of(bs[k / 8][4 * column + holder], k % 2);
    }
  }
}

}  // namespace hicl::cuda
