// Hard-negative mixing: cosines of a query with ĝ, g = α n_a + (1−α) n_b, from the row's k similarities and the entries
// of its k×k Gram matrix that its pairs ask for. The mixtures themselves are never there, in either direction.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

constexpr int64_t kLineBytes = 64;           // of a gradient's row: what threads share it out in
constexpr int64_t kTermsAtATime = 1 << 18;  // 4 MB

// ‖g‖² comes from a sum whose terms can cancel, with an error of a few roundings of the terms. A smaller result has no
// digits that are right: such a mixture has no direction.
template <typename T>
constexpr T kVanishing = 16 * std::numeric_limits<T>::epsilon();

template <typename T>
struct Candidates {
  const T *query, *bank;        // (N, D), (B, D)
  const int64_t *index, *pairs;  // (N, k), (N, m, 2)
  int64_t n, num_bank, d, k, m;
  T alpha, beta;

  Candidates(const Tensor& q, const Tensor& b, const Tensor& i, const Tensor& p, double a)
      : query(q.const_data_ptr<T>()), bank(b.const_data_ptr<T>()), index(i.const_data_ptr<int64_t>()),
        pairs(p.const_data_ptr<int64_t>()), n(q.size(0)), num_bank(b.size(0)), d(q.size(1)), k(i.size(1)),
        m(p.size(1)), alpha(T(a)), beta(T(1 - a)) {}

  const T* query_row(int64_t i) const { return query + i * d; }
  int64_t bank_index(int64_t i, int64_t c) const { return index[i * k + c]; }
  const T* negative(int64_t i, int64_t c) const { return bank + bank_index(i, c) * d; }
  const int64_t* pair(int64_t i, int64_t p) const { return pairs + (i * m + p) * 2; }
};

// n_a · n_b and q · n_a of one row, each computed where it is first asked for.
template <typename T>
class Products {
 public:
  explicit Products(const Candidates<T>& candidates)
      : candidates_(candidates), value_(candidates.k * (candidates.k + 1)), known_(value_.size()) {}

  void start(int64_t i) {
    row_ = i;
    std::fill(known_.begin(), known_.end(), char(0));
  }
  T gram(int64_t a, int64_t b) {
    if (a > b) std::swap(a, b);
    return product(a * candidates_.k + b, candidates_.negative(row_, a), candidates_.negative(row_, b));
  }
  T similarity(int64_t a) {
    return product(candidates_.k * candidates_.k + a, candidates_.query_row(row_), candidates_.negative(row_, a));
  }

 private:
  T product(int64_t at, const T* x, const T* y) {
    if (!known_[at]) {
      value_[at] = row_kernels<T>().dot(x, y, candidates_.d);
      known_[at] = 1;
    }
    return value_[at];
  }

  const Candidates<T>& candidates_;
  std::vector<T> value_;
  std::vector<char> known_;
  int64_t row_ = 0;
};

template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& pairs,
                                   double alpha) {
  const Candidates<T> s(query, bank, index, pairs, alpha);
  Tensor cosine = new_tensor<T>({s.n, s.m}), inverse_norm = new_tensor<T>({s.n, s.m});
  T *cosines = data<T>(cosine), *inverses = data<T>(inverse_norm);
  const UnitRows<T> unit(s.query, s.n, s.d);
  torch::stable::parallel_for(0, s.n, rows_per_thread(s.d * (s.k + s.m)), [&](int64_t begin, int64_t end) {
    Products<T> products(s);
    for (int64_t i = begin; i < end; ++i) {
      products.start(i);
      for (int64_t p = 0; p < s.m; ++p) {
        const int64_t a = s.pair(i, p)[0], b = s.pair(i, p)[1];
        const T parts = s.alpha * s.alpha * products.gram(a, a) + s.beta * s.beta * products.gram(b, b);
        const T squared = parts + 2 * s.alpha * s.beta * products.gram(a, b);
        const bool vanishes = squared < std::max(kVanishing<T> * parts, T(kNormFloor * kNormFloor));
        const T inverse = vanishes ? T(0) : 1 / std::sqrt(squared);
        const T along = s.alpha * products.similarity(a) + s.beta * products.similarity(b);
        inverses[i * s.m + p] = inverse;
        cosines[i * s.m + p] = along * unit.factor(i) * inverse;
      }
    }
  });
  return {cosine, inverse_norm};
}

// ∂L/∂n_c = c_c q̂ − Σ_e M_ce n_e and ∂L/∂q̂ = Σ_c c_c n_c, where with w_pc = α [c = a_p] + (1−α) [c = b_p]
// c_c = Σ_p w_pc u_p / ‖g_p‖ and M_ce = Σ_p w_pc w_pe u_p cos_p / ‖g_p‖² (u: the upstream gradient).
template <typename T>
struct Coefficients {
  std::vector<T> along, across;  // c (k,), M (k, k)

  void gather(const Candidates<T>& s, int64_t i, const T* cosine, const T* inverse_norm, const T* upstream) {
    along.assign(s.k, T(0));
    across.assign(s.k * s.k, T(0));
    for (int64_t p = 0; p < s.m; ++p) {
      const int64_t a = s.pair(i, p)[0], b = s.pair(i, p)[1], at = i * s.m + p;
      const T u = upstream[at] * inverse_norm[at], v = u * cosine[at] * inverse_norm[at];
      along[a] += s.alpha * u;
      along[b] += s.beta * u;
      across[a * s.k + a] += s.alpha * s.alpha * v;
      across[b * s.k + b] += s.beta * s.beta * v;
      across[a * s.k + b] += s.alpha * s.beta * v;
      across[b * s.k + a] += s.alpha * s.beta * v;
    }
  }
};

// What is to be added to the gradients of a block of rows' negatives: lists of vectors and their factors.
template <typename T>
class Additions {
 public:
  Additions(const Candidates<T>& candidates, int64_t num_rows)
      : s_(candidates), term_(num_rows * s_.k * (s_.k + 1)), count_(num_rows * s_.k) {}

  void list(int64_t i, int64_t place, const Coefficients<T>& coefficients, T query_factor) {
    for (int64_t c = 0; c < s_.k; ++c) {
      Term* const first = term_.data() + (place * s_.k + c) * (s_.k + 1);
      Term* next = first;
      const T* across = coefficients.across.data() + c * s_.k;
      if (coefficients.along[c] != 0) *next++ = {coefficients.along[c] * query_factor, s_.query_row(i)};
      for (int64_t e = 0; e < s_.k; ++e)
        if (across[e] != 0) *next++ = {-across[e], s_.negative(i, e)};
      count_[place * s_.k + c] = next - first;
    }
  }
  // Dimensions from:to of the gradient of row i's negative c
  void add(int64_t place, int64_t c, int64_t from, int64_t to, T* gradient) const {
    const RowKernels<T>& kernels = row_kernels<T>();
    const int64_t length = to - from;
    const Term* term = term_.data() + (place * s_.k + c) * (s_.k + 1);
    int64_t left = count_[place * s_.k + c];
    for (; left >= 2; left -= 2, term += 2)
      kernels.combine(gradient, T(1), term[0].factor, term[0].row + from, term[1].factor, term[1].row + from, length);
    if (left) kernels.add_scaled(term->row + from, term->factor, gradient, length);
  }

 private:
  struct Term {
    T factor;
    const T* row;
  };
  const Candidates<T>& s_;
  std::vector<Term> term_;
  std::vector<int64_t> count_;
};

// Threads share out the dimensions, so that every sum is taken in the order of the rows however many threads there are.
template <typename T>
void add_in_order(const Candidates<T>& s, const Additions<T>& additions, int64_t first, int64_t last, T* bank_grad) {
  const int64_t line = kLineBytes / int64_t(sizeof(T)), num_lines = (s.d + line - 1) / line;
  const int64_t lines_per_thread = rows_per_thread((last - first) * s.k * line);
  torch::stable::parallel_for(0, num_lines, lines_per_thread, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * line, to = std::min(s.d, end * line);
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < s.k; ++c)
        additions.add(i - first, c, from, to, bank_grad + s.bank_index(i, c) * s.d + from);
  });
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& query, const Tensor& bank, const Tensor& index, const Tensor& pairs,
                                    double alpha, const Tensor& cosine, const Tensor& inverse_norm,
                                    const Tensor& upstream, bool want_query, bool want_bank) {
  const Candidates<T> s(query, bank, index, pairs, alpha);
  Tensor query_grad = want_query ? new_tensor<T>({s.n, s.d}) : new_tensor<T>({0});
  Tensor bank_grad = want_bank ? new_tensor<T>({s.num_bank, s.d}) : new_tensor<T>({0});
  T *dq = data<T>(query_grad), *db = data<T>(bank_grad);
  const T *cosines = cosine.const_data_ptr<T>(), *inverses = inverse_norm.const_data_ptr<T>();
  const T* u = upstream.const_data_ptr<T>();
  const UnitRows<T> unit(s.query, s.n, s.d);
  const RowKernels<T>& kernels = row_kernels<T>();

  if (want_bank) std::fill(db, db + s.num_bank * s.d, T(0));
  const int64_t block = std::min(s.n, std::max<int64_t>(1, kTermsAtATime / (s.k * (s.k + 1))));
  Additions<T> additions(s, want_bank ? block : 0);
  for (int64_t first = 0; first < s.n; first += block) {
    const int64_t last = std::min(s.n, first + block);
    torch::stable::parallel_for(first, last, rows_per_thread(s.d * s.k), [&](int64_t begin, int64_t end) {
      Coefficients<T> coefficients;
      for (int64_t i = begin; i < end; ++i) {
        coefficients.gather(s, i, cosines, inverses, u);
        if (want_bank) additions.list(i, i - first, coefficients, unit.factor(i));
        if (!want_query) continue;
        T* gradient = dq + i * s.d;
        kernels.scale(s.negative(i, 0), coefficients.along[0] * unit.factor(i), gradient, s.d);
        for (int64_t c = 1; c < s.k; ++c)
          kernels.add_scaled(s.negative(i, c), coefficients.along[c] * unit.factor(i), gradient, s.d);
        unit.project(i, gradient);
      }
    });
    if (want_bank) add_in_order(s, additions, first, last, db);
  }
  return {query_grad, bank_grad};
}

std::tuple<Tensor, Tensor> mixed_negatives(const Tensor& query, const Tensor& bank, const Tensor& index,
                                           const Tensor& pairs, double alpha) {
  const auto typed = query.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return typed(query, bank, index, pairs, alpha);
}

std::tuple<Tensor, Tensor> mixed_negatives_backward(const Tensor& query, const Tensor& bank, const Tensor& index,
                                                    const Tensor& pairs, double alpha, const Tensor& cosine,
                                                    const Tensor& inverse_norm, const Tensor& upstream,
                                                    bool want_query, bool want_bank) {
  const auto typed = query.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return typed(query, bank, index, pairs, alpha, cosine, inverse_norm, upstream, want_query, want_bank);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "mixed_negatives(Tensor query, Tensor bank, Tensor index, Tensor pairs, float alpha) "
      "-> (Tensor cosine, Tensor inverse_norm)");
  m.def(
      "mixed_negatives_backward(Tensor query, Tensor bank, Tensor index, Tensor pairs, float alpha, Tensor cosine, "
      "Tensor inverse_norm, Tensor upstream, bool want_query, bool want_bank) "
      "-> (Tensor query_grad, Tensor bank_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) {
  m.impl("mixed_negatives", TORCH_BOX(&mixed_negatives));
  m.impl("mixed_negatives_backward", TORCH_BOX(&mixed_negatives_backward));
}

}  // namespace hicl
