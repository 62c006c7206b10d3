// A row's mixtures g = α n_a + (1−α) n_b of two of its k hard negatives, from the row's k products with the query and
// the entries of its k×k Gram matrix that its pairs ask for. The mixtures themselves are never there, in either direction.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../constants.h"
#include "memory.h"
#include "rows.h"
#include "unit_rows.h"

namespace hicl {

constexpr int64_t kLineBytes = 64;       // of a gradient's row: what threads share it out in
constexpr int64_t kTermBytes = 4 << 20;  // of what is listed at a time to be added to gradients

// ‖g‖² comes from a sum whose terms can cancel, with an error of a few roundings of the terms. A smaller result has no
// digits that are right: such a mixture has no direction.
template <typename T>
constexpr T kVanishing = kVanishingRoundings * std::numeric_limits<T>::epsilon();

// The mixture α n_a + β n_b, or a multiple of it. `least` is the square below which its length counts as zero.
template <typename T>
struct Mixture {
  int64_t a, b;
  T alpha, beta, least;
};

// Where each row's hard negatives are, and which of them are mixed.
template <typename T>
struct Candidates {
  const T *query, *bank;         // (N, D), (B, D)
  const int64_t *index, *pairs;  // (N, k), (N, m, 2)
  int64_t n, num_bank, d, k, m;
  T alpha, beta;
  const T* shrink = nullptr;  // (B,) what the bank's rows have been multiplied by; null: they are as they came

  const T* query_row(int64_t i) const { return query + i * d; }
  int64_t bank_index(int64_t i, int64_t c) const { return index[i * k + c]; }
  const T* negative(int64_t i, int64_t c) const { return bank + bank_index(i, c) * d; }
  const int64_t* pair(int64_t i, int64_t p) const { return pairs + (i * m + p) * 2; }
  // Of a long row and one that isn't, the mixture is made as short as the long one has been made.
  Mixture<T> mixture(int64_t i, int64_t p) const {
    const int64_t a = pair(i, p)[0], b = pair(i, p)[1];
    constexpr T kLeast = T(kNormFloor * kNormFloor);
    if (!shrink) return {a, b, alpha, beta, kLeast};
    const T of_a = alpha == 0 ? T(1) : shrink[bank_index(i, a)], of_b = beta == 0 ? T(1) : shrink[bank_index(i, b)];
    const T of_both = std::min(of_a, of_b);
    return {a, b, alpha * (of_both / of_a), beta * (of_both / of_b), of_both == 1 ? kLeast : T(0)};
  }
  // ‖g‖ of a mixture as it is, divided by that as `mixture` gives it.
  T lengthening(int64_t i, int64_t p) const {
    if (!shrink) return 1;
    const Mixture<T> taken = mixture(i, p);
    return taken.least == 0 ? 1 / Squares<T>::kShrink : T(1);
  }
};

// n_a · n_b and q · n_a of one row, those that its pairs ask for.
template <typename T>
class Products {
 public:
  explicit Products(const Candidates<T>& candidates)
      : s_(candidates), value_((s_.k + 1) * s_.k), is_asked_(value_.size()), partner_(s_.k), row_(s_.k), result_(s_.k) {}

  void compute(int64_t i) {
    ask(i);
    for (int64_t a = 0; a < s_.k; ++a) multiply(i, a, s_.negative(i, a));
    multiply(i, s_.k, s_.query_row(i));
  }
  T gram(int64_t a, int64_t b) const { return value_[a < b ? a * s_.k + b : b * s_.k + a]; }
  T similarity(int64_t a) const { return value_[s_.k * s_.k + a]; }

 private:
  void ask(int64_t i) {
    std::fill(is_asked_.begin(), is_asked_.end(), char(0));
    for (int64_t p = 0; p < s_.m; ++p) {
      const int64_t a = s_.pair(i, p)[0], b = s_.pair(i, p)[1];
      is_asked_[a * s_.k + a] = is_asked_[b * s_.k + b] = is_asked_[s_.k * s_.k + a] = is_asked_[s_.k * s_.k + b] = 1;
      is_asked_[std::min(a, b) * s_.k + std::max(a, b)] = 1;
    }
  }
  // Row `line` of the table: x times the negatives that it is asked for with.
  void multiply(int64_t i, int64_t line, const T* x) {
    int64_t count = 0;
    for (int64_t b = 0; b < s_.k; ++b)
      if (is_asked_[line * s_.k + b]) partner_[count] = b, row_[count++] = s_.negative(i, b);
    row_kernels<T>().dots(x, row_.data(), count, result_.data(), s_.d);
    for (int64_t t = 0; t < count; ++t) value_[line * s_.k + partner_[t]] = result_[t];
  }

  const Candidates<T>& s_;
  std::vector<T> value_;  // (k + 1, k): the Gram matrix above its diagonal, and the similarities
  std::vector<char> is_asked_;
  std::vector<int64_t> partner_;
  std::vector<const T*> row_;
  std::vector<T> result_;
};

// Row i's m cosines, and 1 / ‖g‖ of its mixtures as they are taken; 0 for one that vanishes. `query_factor` is 1 / ‖q_i‖.
// Returns whether all squares stayed within the type's range.
template <typename T>
bool mix(const Candidates<T>& s, int64_t i, T query_factor, Products<T>& products, T* cosine, T* inverse_norm) {
  products.compute(i);
  bool fits = true;
  for (int64_t p = 0; p < s.m; ++p) {
    const auto [a, b, alpha, beta, least] = s.mixture(i, p);
    const T parts = alpha * alpha * products.gram(a, a) + beta * beta * products.gram(b, b);
    const T squared = parts + 2 * alpha * beta * products.gram(a, b);
    fits &= parts < Squares<T>::kMost;
    const bool vanishes = squared < std::max(kVanishing<T> * parts, least);
    inverse_norm[p] = vanishes ? std::numeric_limits<T>::infinity() : squared;
    cosine[p] = query_factor * (alpha * products.similarity(a) + beta * products.similarity(b));
  }
  for (int64_t p = 0; p < s.m; ++p) {  // by itself, so that the compiler makes vectors of it
    inverse_norm[p] = 1 / std::sqrt(inverse_norm[p]);
    cosine[p] *= inverse_norm[p];
  }
  return fits;
}

// ∂L/∂n_c = c_c q̂ − Σ_e M_ce n_e and ∂L/∂q̂ = Σ_c c_c n_c, where with w_pc = α [c = a_p] + (1−α) [c = b_p]
// c_c = Σ_p w_pc u_p / ‖g_p‖ and M_ce = Σ_p w_pc w_pe u_p cos_p / ‖g_p‖² (u: the upstream gradient).
template <typename T>
struct Coefficients {
  std::vector<T> along, across;  // c (k,), M (k, k)

  // Row i's; the last three are (m,).
  void gather(const Candidates<T>& s, int64_t i, const T* cosine, const T* inverse_norm, const T* upstream) {
    along.assign(s.k, T(0));
    across.assign(s.k * s.k, T(0));
    for (int64_t p = 0; p < s.m; ++p) {
      const auto [a, b, alpha, beta, least] = s.mixture(i, p);
      const T u = upstream[p] * inverse_norm[p], v = u * cosine[p] * inverse_norm[p];
      along[a] += alpha * u;
      along[b] += beta * u;
      across[a * s.k + a] += alpha * alpha * v;
      across[b * s.k + b] += beta * beta * v;
      across[a * s.k + b] += alpha * beta * v;
      across[b * s.k + a] += alpha * beta * v;
    }
  }
};

// What is to be added to the gradients of a block of rows' negatives: lists of vectors and their factors.
template <typename T>
class Additions {
 public:
  // `num_rows` of them at a time, in memory of the call.
  Additions(const Candidates<T>& candidates, int64_t num_rows, Workspace& workspace)
      : s_(candidates), row_(workspace.take<const T*>(num_terms(num_rows, s_.k))),
        factor_(workspace.take<T>(num_terms(num_rows, s_.k))), count_(workspace.take<int64_t>(num_rows * s_.k)) {}
  static int64_t row_bytes(int64_t k) { return num_terms(1, k) * int64_t(sizeof(const T*) + sizeof(T)); }
  static int64_t bytes(int64_t num_rows, int64_t k) {
    return Workspace::bytes_of<const T*>(num_terms(num_rows, k)) + Workspace::bytes_of<T>(num_terms(num_rows, k)) +
           Workspace::bytes_of<int64_t>(num_rows * k);
  }

  // `factor` is of all coefficients; a query factor of 0: what is along the query is added elsewhere. Each is written, and
  // the next one over it if it is 0: which are can't be guessed, and a processor's wrong guess costs more than a store.
  void list(int64_t i, int64_t place, const Coefficients<T>& coefficients, T factor, T query_factor) {
    for (int64_t c = 0; c < s_.k; ++c) {
      const int64_t first = begin(place, c);
      int64_t next = first;
      const auto add = [&](T coefficient, const T* row) {
        factor_[next] = factor * coefficient;
        row_[next] = row;
        next += coefficient != 0;
      };
      add(coefficients.along[c] * query_factor, s_.query_row(i));
      for (int64_t e = 0; e < s_.k; ++e) add(-coefficients.across[c * s_.k + e], s_.negative(i, e));
      count_[place * s_.k + c] = next - first;
    }
  }
  void clear(int64_t place) { std::fill_n(count_ + place * s_.k, s_.k, int64_t(0)); }
  bool is_empty(int64_t place, int64_t c) const { return count_[place * s_.k + c] == 0; }

  // Dimensions from:to of the gradient of row i's negative c
  void add(int64_t place, int64_t c, int64_t from, int64_t to, T* gradient) const {
    const int64_t first = begin(place, c);
    row_kernels<T>().add_rows(gradient, row_ + first, factor_ + first, count_[place * s_.k + c], from, to - from);
  }

 private:
  static int64_t num_terms(int64_t num_rows, int64_t k) { return num_rows * k * (k + 1); }
  int64_t begin(int64_t place, int64_t c) const { return num_terms(place, s_.k) + c * (s_.k + 1); }

  const Candidates<T>& s_;
  const T** row_;
  T* factor_;
  int64_t* count_;
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
        if (!additions.is_empty(i - first, c))
          additions.add(i - first, c, from, to, bank_grad + s.bank_index(i, c) * s.d + from);
  });
}

}  // namespace hicl
