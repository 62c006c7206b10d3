// Which of a row's hard negatives are mixed with which: hicl_fast/pairs.py, in one pass instead of some thirty.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

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

// The pairs (a, b), a < b < k, in order: (0, 1), (0, 2), (1, 2), (0, 3), ...; kept where they are few.
class Pairs {
 public:
  explicit Pairs(int64_t k) {
    if (k * (k - 1) / 2 > kMostKept) return;
    for (int64_t b = 1; b < k; ++b)
      for (int64_t a = 0; a < b; ++a) kept_.push_back({a, b});
  }
  std::array<int64_t, 2> operator[](int64_t rank) const {
    if (!kept_.empty()) return kept_[rank];
    int64_t b = int64_t((1 + std::sqrt(float(8 * rank + 1))) / 2);
    b -= b * (b - 1) / 2 > rank;  // the root is off by one at most
    b += b * (b + 1) / 2 <= rank;
    return {rank - b * (b - 1) / 2, b};
  }

 private:
  static constexpr int64_t kMostKept = 1024;
  std::vector<std::array<int64_t, 2>> kept_;
};

Tensor random_pairs(int64_t num_rows, int64_t num_mixed, int64_t k, int64_t seed, int64_t first_row) {
  constexpr int64_t kLargestK = 1 << 16;  // hicl_fast/pairs.py says why
  STD_TORCH_CHECK(2 <= k && k <= kLargestK, "random_pairs: k: expected 2 to ", kLargestK, ", got ", k);
  STD_TORCH_CHECK(num_rows >= 0 && num_mixed >= 0 && first_row >= 0,
                  "random_pairs: expected num_rows, num_mixed and first_row of at least 0, got ", num_rows, ", ", num_mixed,
                  " and ", first_row);
  Tensor pairs = new_tensor<int64_t>({num_rows, num_mixed, 2});
  int64_t* out = data<int64_t>(pairs);
  const Pairs pairs_of_k(k);
  const uint64_t start = mixed(uint64_t(seed) + kGolden), num_pairs = uint64_t(k) * uint64_t(k - 1) / 2;
  torch::stable::parallel_for(0, num_rows, rows_per_thread(num_mixed), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t p = 0; p < num_mixed; ++p) {
        const uint64_t counter = ((uint64_t(first_row) + uint64_t(i)) << 32) + uint64_t(p);
        const uint64_t random = mixed(counter * kGolden + start) >> 32;
        const auto [a, b] = pairs_of_k[int64_t(random * num_pairs >> 32)];
        out[(i * num_mixed + p) * 2] = a;
        out[(i * num_mixed + p) * 2 + 1] = b;
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
