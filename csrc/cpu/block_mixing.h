// Hard-negative mixing inside a sweep: each row's k hardest keys are chosen from its logits while they are in cache, and
// what their mixtures put into the gradients is left in the row, as far as it lies along the query, and listed, as far as
// it doesn't.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "matmul.h"
#include "mixing.h"
#include "rows.h"
#include "top_k.h"

namespace hicl {

// Which of each row's k hardest keys are mixed.
struct MixingRules {
  const int64_t* pairs;  // (N, m, 2)
  int64_t* index;        // (N, k) written: the keys that were chosen; −1 where a row has fewer candidates
  int64_t num_mixed, k;
  double alpha;
};

template <typename T>
class BlockMixing {
 public:
  BlockMixing(const MixingRules& rules, Matrix<const T> query, const UnitRows<T>& keys, int64_t block_rows,
              Workspace& workspace)
      : s_{query.data, keys.row(0), rules.index, rules.pairs, query.rows, keys.count(), query.columns, rules.k,
           rules.num_mixed, T(rules.alpha), T(1 - rules.alpha), keys.shrinks()},
        index_(rules.index), additions_(s_, block_rows, workspace), radial_(block_rows * s_.k), kept_(keys.count()) {}
  // Of the workspace.
  static int64_t bytes(const std::optional<MixingRules>& rules, int64_t block_rows) {
    return rules ? Additions<T>::bytes(block_rows, rules->k) : 0;
  }
  BlockMixing(const BlockMixing&) = delete;  // `additions_` points to `s_`

  // Rows whose lists fit into a few megabytes; beyond some 60 mixed keys a row more, since products of few rows are slow.
  static int64_t most_rows(int64_t k) { return std::max<int64_t>(64, kTermBytes / Additions<T>::row_bytes(k)); }

  // What a thread needs for the row it is at.
  class Row {
   public:
    explicit Row(BlockMixing& block)
        : block_(block), best_(block.s_.k), products_(block.s_), cosine_(block.s_.m), inverse_norm_(block.s_.m),
          value_(block.s_.k) {}

    // From the logits of the keys (M,), −inf where one is no candidate, to those of the mixtures (m,), all −inf where there
    // are fewer candidates than k. Returns the largest.
    T mix(int64_t i, T query_factor, T scale, const T* key_logits, T* mixed_logits) {
      const Candidates<T>& s = block_.s_;
      best_.offer(key_logits, 0, s.num_bank);
      best_.take(value_.data(), block_.index_ + i * s.k);
      T most = -std::numeric_limits<T>::infinity();
      if (!is_complete(i)) {
        std::fill(mixed_logits, mixed_logits + s.m, most);
        return most;
      }
      hicl::mix(s, i, query_factor, products_, cosine_.data(), inverse_norm_.data());
      for (int64_t p = 0; p < s.m; ++p) most = std::max(most, mixed_logits[p] = cosine_[p] * scale);
      return most;
    }

    // `upstream` (m,) and `entries` (M,): ∂loss/∂cosine of the mixtures and ∂loss/∂(k_j · q̂), both without `factor`.
    void differentiate(int64_t i, int64_t place, T query_factor, T factor, const T* upstream, T* entries) {
      const Candidates<T>& s = block_.s_;
      T* radial = block_.radial_.data() + place * s.k;
      std::fill(radial, radial + s.k, T(0));
      if (!is_complete(i)) {
        block_.additions_.clear(place);
        return;
      }
      coefficients_.gather(s, i, cosine_.data(), inverse_norm_.data(), upstream);
      block_.additions_.list(i, place, coefficients_, factor, T(0));
      for (int64_t c = 0; c < s.k; ++c) entries[s.bank_index(i, c)] += coefficients_.along[c];
      // n_a · ∂/∂n_a and n_b · ∂/∂n_b are each other's negatives, since a cosine doesn't change with the length of g. But
      // what is rounding beside a long n_a's part can be more than all of a short n_b's: each is computed by itself.
      for (int64_t p = 0; p < s.m; ++p) {
        const Mixture<T> mixed = s.mixture(i, p);
        const T inverse = inverse_norm_[p], u = factor * upstream[p] * inverse, v = cosine_[p] * inverse;
        const auto along = [&](int64_t c) {
          return query_factor * products_.similarity(c) -
                 v * (mixed.alpha * products_.gram(mixed.a, c) + mixed.beta * products_.gram(mixed.b, c));
        };
        radial[mixed.a] += mixed.alpha * u * along(mixed.a);
        radial[mixed.b] += mixed.beta * u * along(mixed.b);
      }
    }

   private:
    bool is_complete(int64_t i) const { return block_.index_[(i + 1) * block_.s_.k - 1] >= 0; }

    BlockMixing& block_;
    TopK<T> best_;
    Products<T> products_;
    Coefficients<T> coefficients_;
    std::vector<T> cosine_, inverse_norm_, value_;  // (m,), (m,), (k,)
  };

  // The listed part of rows first:last, once their products have been added.
  void add_to(T* key_gradient, int64_t first, int64_t last) {
    add_in_order(s_, additions_, first, last, key_gradient);
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < s_.k; ++c)
        if (const T radial = radial_[(i - first) * s_.k + c]) kept_[s_.bank_index(i, c)] += radial;
  }
  // (M,) key · its gradient by way of mixtures: a mixture is of keys as they are, not of unit vectors.
  const T* kept() const { return kept_.data(); }

 private:
  Candidates<T> s_;
  int64_t* index_;
  Additions<T> additions_;
  std::vector<T> radial_, kept_;  // (R, k), (M,)
};

}  // namespace hicl
