// Which of a row's hard negatives are mixed with which: hicl_fast/pairs.py, in one pass instead of some thirty.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>

#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

// splitmix64's finaliser
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// Pairs (a, b), a < b, in order: (0, 1), (0, 2), (1, 2), (0, 3), ...
void write_pair(int64_t rank, int64_t* pair) {
  int64_t b = int64_t((1 + std::sqrt(float(8 * rank + 1))) / 2);
  b -= b * (b - 1) / 2 > rank;  // the root is off by one at most
  b += b * (b + 1) / 2 <= rank;
  pair[0] = rank - b * (b - 1) / 2;
  pair[1] = b;
}

Tensor random_pairs(int64_t num_rows, int64_t num_mixed, int64_t k, int64_t seed, int64_t first_row) {
  Tensor pairs = new_tensor<int64_t>({num_rows, num_mixed, 2});
  int64_t* out = data<int64_t>(pairs);
  const uint64_t start = mixed(uint64_t(seed) + kGolden), num_pairs = uint64_t(k) * uint64_t(k - 1) / 2;
  torch::stable::parallel_for(0, num_rows, rows_per_thread(num_mixed), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t p = 0; p < num_mixed; ++p) {
        const uint64_t counter = (uint64_t(first_row + i) << 32) + uint64_t(p);
        const uint64_t random = mixed(counter * kGolden + start) >> 32;
        write_pair(int64_t(random * num_pairs >> 32), out + (i * num_mixed + p) * 2);
      }
  });
  return pairs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def("random_pairs(int num_rows, int num_mixed, int k, int seed, int first_row) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CompositeExplicitAutograd, m) { m.impl("random_pairs", TORCH_BOX(&random_pairs)); }

}  // namespace hicl
