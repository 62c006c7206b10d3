// Hard-negative mixing by itself: cosines of a query with mixtures of its given negatives, and their gradients.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "memory.h"
#include "mixing.h"
#include "row_blocks.h"
#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

TensorChecks check_candidates(const char* op, const Tensor& query, const Tensor& bank, const Tensor& index,
                              const Tensor& pairs) {
  const TensorChecks check(op, query);
  const ScalarType type = sum_type(check, "query", query);
  const int64_t n = query.size(0), d = query.size(1);
  check("query", query, type, {n, d});
  check("bank", bank, type, {kAny, d});
  check("index", index, ScalarType::Long, {n, kAny});
  check.that(index.size(1) > 0, "index", "expected at least one column, got 0");
  check_range(check, "index", index, 0, bank.size(0), "rows of bank");
  check("pairs", pairs, ScalarType::Long, {n, kAny, 2});
  check_range(check, "pairs", pairs, 0, index.size(1), "columns of index");
  return check;
}

// The candidates, their queries' factors, and the bank's where it has long rows: to know that takes a pass over the whole
// bank, of which few rows may be candidates.
template <typename T>
struct Mixed {
  UnitRows<T> unit;
  std::optional<UnitRows<T>> bank;
  Candidates<T> candidates;

  Mixed(const Tensor& query, const Tensor& rows, const Tensor& index, const Tensor& pairs, double alpha)
      : unit(query.const_data_ptr<T>(), query.size(0), query.size(1)),
        candidates{unit.row(0), rows.const_data_ptr<T>(), index.const_data_ptr<int64_t>(), pairs.const_data_ptr<int64_t>(),
                   query.size(0), rows.size(0), query.size(1), index.size(1), pairs.size(1), T(alpha), T(1 - alpha)} {}
  Mixed(const Mixed&) = delete;

  void shorten_bank() {
    bank.emplace(candidates.bank, candidates.num_bank, candidates.d);
    candidates.bank = bank->row(0), candidates.shrink = bank->shrinks();
  }
};

// A mixture whose 1 / ‖g‖ is smaller may have a square that leaves the type's range. NaN is none.
template <typename T>
bool any_is_long(const T* inverse_norm, int64_t count) {
  constexpr T kShortest = power_of_two<T>(4 - std::numeric_limits<T>::max_exponent / 2);
  return std::any_of(inverse_norm, inverse_norm + count, [](T x) { return x > 0 && x < kShortest; });
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& pairs,
                                   double alpha) {
  Mixed<T> mixed(query, bank, index, pairs, alpha);
  const Candidates<T>& s = mixed.candidates;
  Tensor cosine = new_tensor<T>({s.n, s.m}), inverse_norm = new_tensor<T>({s.n, s.m});
  T *cosines = data<T>(cosine), *inverses = data<T>(inverse_norm);
  std::atomic<bool> fits(true);
  const auto each_row = [&](int64_t begin, int64_t end) {
    Products<T> products(s);
    for (int64_t i = begin; i < end; ++i) {
      if (!mix(s, i, mixed.unit.factor(i), products, cosines + i * s.m, inverses + i * s.m))
        fits.store(false, std::memory_order_relaxed);
      for (int64_t p = 0; s.shrink && p < s.m; ++p) inverses[i * s.m + p] /= s.lengthening(i, p);
    }
  };
  const int64_t rows = rows_per_thread(s.d * (s.k + s.m));
  torch::stable::parallel_for(0, s.n, rows, each_row);
  if (!fits) {
    mixed.shorten_bank();
    torch::stable::parallel_for(0, s.n, rows, each_row);
  }
  return {cosine, inverse_norm};
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& pairs,
                                    double alpha, const Tensor& cosine, const Tensor& inverse_norm,
                                    const Tensor& upstream, bool want_query, bool want_bank, int64_t term_bytes) {
  Mixed<T> mixed(query, bank, index, pairs, alpha);
  const Candidates<T>& s = mixed.candidates;
  Tensor query_grad = want_query ? new_tensor<T>({s.n, s.d}) : new_tensor<T>({0});
  Tensor bank_grad = want_bank ? new_tensor<T>({s.num_bank, s.d}) : new_tensor<T>({0});
  T *dq = data<T>(query_grad), *db = data<T>(bank_grad);
  const T *cosines = cosine.const_data_ptr<T>(), *inverses = inverse_norm.const_data_ptr<T>();
  const T* u = upstream.const_data_ptr<T>();
  if (any_is_long(inverses, s.n * s.m)) mixed.shorten_bank();
  const UnitRows<T>& unit = mixed.unit;
  const RowKernels<T>& kernels = row_kernels<T>();

  if (want_bank) std::fill(db, db + s.num_bank * s.d, T(0));
  const RowBlocks blocks(s.n, Additions<T>::row_bytes(s.k), term_bytes, s.n, 1);
  const int64_t listed = want_bank ? blocks.rows() : 0;
  Workspace workspace(Additions<T>::bytes(listed, s.k));
  Additions<T> additions(s, listed, workspace);
  blocks.each([&](int64_t first, int64_t count) {
    const int64_t last = first + count;
    torch::stable::parallel_for(first, last, rows_per_thread(s.d * s.k), [&](int64_t begin, int64_t end) {
      Coefficients<T> coefficients;
      std::vector<const T*> negatives(s.k);
      std::vector<T> inverse(s.m);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t p = 0; p < s.m; ++p) inverse[p] = inverses[i * s.m + p] * s.lengthening(i, p);
        coefficients.gather(s, i, cosines + i * s.m, inverse.data(), u + i * s.m);
        if (want_bank) additions.list(i, i - first, coefficients, T(1), unit.factor(i));
        if (!want_query) continue;
        T* gradient = dq + i * s.d;
        std::fill(gradient, gradient + s.d, T(0));
        for (int64_t c = 0; c < s.k; ++c) {
          coefficients.along[c] *= unit.factor(i);
          negatives[c] = s.negative(i, c);
        }
        kernels.add_rows(gradient, negatives.data(), coefficients.along.data(), s.k, 0, s.d);
        unit.project(i, gradient);
      }
    });
    if (want_bank) add_in_order(s, additions, first, last, db);
  });
  if (want_bank && s.shrink)
    for (int64_t j = 0; j < s.num_bank; ++j) kernels.scale(db + j * s.d, s.shrink[j], db + j * s.d, s.d);
  return {query_grad, bank_grad};
}

std::tuple<Tensor, Tensor> mixed_negatives(const Tensor& query, const Tensor& bank, const Tensor& index,
                                           const Tensor& pairs, double alpha) {
  check_candidates("mixed_negatives", query, bank, index, pairs);
  const auto typed = query.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return typed(query, bank, index, pairs, alpha);
}

std::tuple<Tensor, Tensor> mixed_negatives_backward(const Tensor& query, const Tensor& bank, const Tensor& index,
                                                    const Tensor& pairs, double alpha, const Tensor& cosine,
                                                    const Tensor& inverse_norm, const Tensor& upstream,
                                                    bool want_query, bool want_bank, int64_t term_bytes) {
  const TensorChecks check = check_candidates("mixed_negatives_backward", query, bank, index, pairs);
  const ScalarType type = query.scalar_type();
  check("cosine", cosine, type, {pairs.size(0), pairs.size(1)});
  check("inverse_norm", inverse_norm, type, {pairs.size(0), pairs.size(1)});
  check("upstream", upstream, type, {pairs.size(0), pairs.size(1)});
  const auto typed = query.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return typed(query, bank, index, pairs, alpha, cosine, inverse_norm, upstream, want_query, want_bank, term_bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "mixed_negatives(Tensor query, Tensor bank, Tensor index, Tensor pairs, float alpha) "
      "-> (Tensor cosine, Tensor inverse_norm)");
  m.def(
      "mixed_negatives_backward(Tensor query, Tensor bank, Tensor index, Tensor pairs, float alpha, Tensor cosine, "
      "Tensor inverse_norm, Tensor upstream, bool want_query, bool want_bank, int term_bytes=4194304) "
      "-> (Tensor query_grad, Tensor bank_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) {
  m.impl("mixed_negatives", TORCH_BOX(&mixed_negatives));
  m.impl("mixed_negatives_backward", TORCH_BOX(&mixed_negatives_backward));
}

}  // namespace hicl
