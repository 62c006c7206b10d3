// Chooses the row kernels by the processor, once; HICL_FAST_CPU asks for a narrower set that it has.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

#include "rows.h"

namespace hicl {
namespace {

enum Level { kPlain, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"plain", "avx2", "avx512"};

Level hardware_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return !has_avx2 ? kPlain : has_avx512 ? kAvx512 : kAvx2;
#else
  return kPlain;
#endif
}

Level level() {
  static const Level chosen = [] {
    const Level hardware = hardware_level();
    const char* asked = std::getenv("HICL_FAST_CPU");
    if (!asked || !*asked) return hardware;
    for (int l = kPlain; l <= hardware; ++l)
      if (std::string(asked) == kNames[l]) return Level(l);
    STD_TORCH_CHECK(false, "HICL_FAST_CPU: expected one of ", cpu_capabilities(), ", which this processor has, got ", asked);
  }();
  return chosen;
}

}  // namespace

const char* cpu_capabilities() {
  static const char* kUpTo[] = {"plain", "plain avx2", "plain avx2 avx512"};
  return kUpTo[hardware_level()];
}

namespace {

template <typename T>
const RowKernels<T>& pick(const RowKernels<T>& plain, const RowKernels<T>& avx2, const RowKernels<T>& avx512) {
  return level() == kAvx512 ? avx512 : level() == kAvx2 ? avx2 : plain;
}

}  // namespace

#if defined(__x86_64__)
template <>
const RowKernels<float>& row_kernels<float>() {
  return pick(plain::kFloat, avx2::kFloat, avx512::kFloat);
}
template <>
const RowKernels<double>& row_kernels<double>() {
  return pick(plain::kDouble, avx2::kDouble, avx512::kDouble);
}
#else
template <>
const RowKernels<float>& row_kernels<float>() {
  return plain::kFloat;
}
template <>
const RowKernels<double>& row_kernels<double>() {
  return plain::kDouble;
}
#endif

const char* cpu_capability() { return kNames[level()]; }

}  // namespace hicl
