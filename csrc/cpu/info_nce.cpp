// InfoNCE over cosine similarities: loss and gradients in one sweep over blocks of rows.
//
// A block's logits (R, C), every column of R rows, are the largest thing there is. For each block: one product gives
// the raw similarities; each row, in cache, goes from similarities to softmax to ∂loss/∂similarity; two products add to
// the gradients. That is 6 N C D operations, three matrix products, and two passes over R × C elements in cache.
// Inputs are never copied into normalised form: the keys' factors 1/‖k‖ go into the logits and into ∂loss/∂similarity;
// a row's weight · probability factor goes into the small operand of the products, not over its C elements.
//
// The symmetric loss must see every row of a column before the column's softmax is known: it sweeps twice, 8 N C D,
// unless one block holds everything.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "block_mixing.h"
#include "equal_products.h"
#include "groups.h"
#include "matmul.h"
#include "memory.h"
#include "rows.h"
#include "tensors.h"
#include "unit_rows.h"

namespace hicl {
namespace {

constexpr double kAngleClamp = 1e-7;
// Rows in a block: the BLAS packs the keys anew for every block, which 1024 rows pay for; less where memory says so.
constexpr int64_t kMinBlockRows = 64, kMaxBlockRows = 1024;
constexpr int64_t kBlockBytes = 128 << 20;  // of logits
constexpr int64_t kMaxChunk = 4096;         // of keys in one product, where hard negatives are chosen

enum class SameGroup : int64_t { kExclude, kNegative, kPositive };

// log(1 + eˣ) with all digits of a small result
double log1p_exp(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }
double logaddexp(double a, double b) {
  if (a == b) return a + std::log(2.0);  // also for −inf, whose difference is NaN
  return std::max(a, b) + log1p_exp(-std::abs(a - b));
}

struct Wanted {
  bool query, key, negatives, extra_logits, scale;
  explicit Wanted(int64_t bits)
      : query(bits & 1), key(bits & 2), negatives(bits & 4), extra_logits(bits & 8), scale(bits & 16) {}
  bool any() const { return query || key || negatives || extra_logits || scale; }
};

struct Rules {
  double scale;  // 1 / temperature
  double hard_negative_weight;
  SameGroup same_group;
  double margin;
  bool symmetric;
};

// The columns of one input: keys, explicit negatives or bank rows.
template <typename T>
struct Segment {
  UnitRows<T> unit;
  int64_t first;  // column
  T* gradient;    // (count, D), or null where none is wanted
};

template <typename T>
struct Outputs {
  T *loss, *negative_lse, *column_lse, *positive, *hardest;     // (N,), (N,), (M,) or empty, (N,), (N,)
  T* total;                                                     // () common weight · Σ loss
  T *query_gradient, *extra_gradient, *scale_gradient;          // null where not wanted
};

// What a row's positive comes to.
struct Positive {
  int64_t column;
  double similarity, logit, slope;  // slope: derivative of the margin-adjusted similarity
};

template <typename T>
class Sweep {
 public:
  Sweep(Matrix<const T> query, const Rules& rules, const Outputs<T>& out, Wanted wanted)
      : query_(query), unit_query_(query.data, query.rows, query.columns), rules_(rules), out_(out), wanted_(wanted) {}

  void add_segment(const T* rows, int64_t count, T* gradient) {
    if (count == 0 && !segments_.empty()) return;
    segments_.push_back({UnitRows<T>(rows, count, query_.columns), num_similarities_, gradient});
    column_factor_.insert(column_factor_.end(), segments_.back().unit.factors(),
                          segments_.back().unit.factors() + count);
    for (int64_t j = 0; j < count; ++j) {
      const T factor = segments_.back().unit.factor(j);
      logit_factor_.push_back(factor == 0 ? T(1) : factor);  // −inf, where a column is left out, times 0 would be NaN
    }
    num_similarities_ += count;
  }
  void set_target(const int64_t* target) { target_ = target; }
  void set_extra(const T* logits, int64_t count) { extra_ = logits, num_extra_ = count; }
  void set_own_negatives(int64_t first) { first_own_ = rules_.hard_negative_weight != 0 ? first : -1; }
  void set_groups(const int64_t* query_group, const int64_t* key_group) {
    if (query_group && rules_.same_group != SameGroup::kNegative) {
      query_group_ = query_group;
      groups_ = GroupIndex(key_group, segments_[0].unit.count());
    }
  }
  // Mixtures of each row's hardest keys are further columns, after the extra logits.
  void set_mixing(const MixingRules& rules) { mixing_rules_ = rules; }
  // One weight for all rows, and one for each where there are any.
  void set_row_weight(double common, const T* each) { common_weight_ = common, row_weight_ = each; }

  void run() {
    const int64_t n = query_.rows, block = block_rows();
    const int64_t room = rounded_up(block, kRowMultiple);
    num_columns_ = num_columns();
    column_factor_.resize(num_columns_, T(1));
    row_stride_ = row_stride();
    Workspace workspace(Workspace::bytes_of<T>(room * row_stride_) + Workspace::bytes_of<T>(room * query_.columns) +
                        BlockMixing<T>::bytes(mixing_rules_, block));
    logits_ = workspace.take<T>(room * row_stride_);
    unit_block_ = workspace.take<T>(room * query_.columns);
    if (mixing_rules_) mixing_.emplace(*mixing_rules_, query_, segments_[0].unit, block, workspace);
    row_factor_.resize(block);
    positive_entry_.resize(block);
    moment_.assign(n, 0.0);
    if (rules_.symmetric) prepare_both_directions();

    for (int64_t first = 0; first < n; first += block) {
      const int64_t count = std::min(block, n - first);
      similarities(first, count);
      if (rules_.symmetric) {
        each_row(first, count, [&](int64_t i, T* row) { symmetric_statistics(i, row); });
        column_statistics(count);
      } else {
        each_range(count, [&](int64_t begin, int64_t end) {
          std::optional<MixingRow> mixing;
          if (mixing_) mixing.emplace(*mixing_);
          for (int64_t r = begin; r < end; ++r) one_direction(first + r, r, logits(r), mixing ? &*mixing : nullptr);
        });
        if (wanted_.any()) products(first, count);
      }
    }
    if (rules_.symmetric) second_sweep(block);
    if (wanted_.any()) finish_gradients();
    *out_.total = T(common_weight_ * std::accumulate(out_.loss, out_.loss + n, 0.0));
  }

 private:
  using MixingRow = typename BlockMixing<T>::Row;

  int64_t num_columns() const {
    return num_similarities_ + num_extra_ + (mixing_rules_ ? mixing_rules_->num_mixed : 0);
  }
  Chunks key_chunks() const { return {segments_[0].unit.count(), kColumnMultiple<T>, kMaxChunk}; }
  int64_t row_stride() const {
    return padded(mixing_rules_ ? std::max(num_columns(), key_chunks().width()) : num_columns());
  }
  int64_t block_rows() const {
    int64_t most = std::clamp(kBlockBytes / (int64_t(sizeof(T)) * row_stride()), kMinBlockRows, kMaxBlockRows);
    if (mixing_rules_) most = std::clamp(BlockMixing<T>::most_rows(mixing_rules_->k), kMinBlockRows, most);
    return std::min(query_.rows, most);
  }
  // An odd number of cache lines: rows a power of two apart fall into the same few lines of the cache.
  static int64_t padded(int64_t columns) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((columns + kLine - 1) / kLine | 1) * kLine;
  }
  T* logits(int64_t i) { return logits_ + i * row_stride_; }
  int64_t target(int64_t i) const { return target_ ? target_[i] : i; }
  double row_weight(int64_t i) const { return row_weight_ ? common_weight_ * double(row_weight_[i]) : common_weight_; }
  Matrix<T> unit_block(int64_t count) { return {unit_block_, count, query_.columns, query_.columns}; }

  template <typename F>
  void each_range(int64_t count, F f) {
    torch::stable::parallel_for(0, count, rows_per_thread(num_columns_), f);
  }
  template <typename F>
  void each_row(int64_t first, int64_t count, F f) {
    each_range(count, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(first + r, logits(r));
    });
  }

  template <typename F>
  void each_block_row(int64_t count, F f) {
    torch::stable::parallel_for(0, count, rows_per_thread(query_.columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, unit_block_ + r * query_.columns);
    });
  }

  // logits(r) = q̂_i · k_j for the block's rows and all columns that are similarities
  void similarities(int64_t first, int64_t count) {
    each_block_row(count, [&](int64_t r, T* unit_query) {
      k_.scale(unit_query_.row(first + r), unit_query_.factor(first + r), unit_query, query_.columns);
    });
    if (mixing_) key_similarities(count);  // wider than the keys where they are few: before the other columns
    for (const Segment<T>& s : segments_) {
      if (s.unit.count() == 0 || (mixing_ && s.first == 0)) continue;
      const Matrix<const T> columns{s.unit.row(0), s.unit.count(), query_.columns, query_.columns};
      matmul(Matrix<T>{logits_ + s.first, count, s.unit.count(), row_stride_}, unit_block(count),
             columns.transposed());
    }
    block_first_ = first;
  }

  // As `hard_negatives` takes them, so that the same keys are chosen.
  void key_similarities(int64_t count) {
    const int64_t rows = rounded_up(count, kRowMultiple), d = query_.columns;
    std::fill(unit_block_ + count * d, unit_block_ + rows * d, T(0));
    const UnitRows<T>& keys = segments_[0].unit;
    const Chunks chunks = key_chunks();
    for (int64_t column = 0; column < keys.count(); column += chunks.width()) {
      const int64_t begin = chunks.begin(column), end = chunks.end(column);
      multiply_chunk(Matrix<T>{logits_ + begin, rows, chunks.width(), row_stride_}, unit_block(rows),
                     Matrix<const T>{keys.row(begin), end - begin, d, d}, chunks.width(), padded_keys_);
    }
  }

  // The positive's dot product is taken once more by itself, so that it is exact whatever the products' precision.
  Positive find_positive(int64_t i) const {
    const UnitRows<T>& keys = segments_[0].unit;
    const int64_t column = target(i);
    const T* unit_query = unit_block_ + (i - block_first_) * query_.columns;
    const double s = double(k_.dot(unit_query, keys.row(column), query_.columns)) * double(keys.factor(column));
    if (rules_.margin == 0) return {column, s, s * rules_.scale, 1.0};
    // The bounds are the type's nearest, as in a comparison in that type.
    const double low = T(-1 + kAngleClamp), high = T(1 - kAngleClamp);
    const double theta = std::acos(s < low ? low : s > high ? high : s);
    const bool clamped = s < low || s > high;
    return {column, s, std::cos(theta + rules_.margin) * rules_.scale,
            clamped ? 0.0 : std::sin(theta + rules_.margin) / std::sin(theta)};
  }

  // From raw similarities to logits with −inf where a column doesn't compete with the positive.
  // Returns the largest of them over all columns but the own negative and the extra ones.
  T mask_and_scale(int64_t i, T* row, const Positive& positive) {
    constexpr T kNothing = -std::numeric_limits<T>::infinity();
    row[positive.column] = kNothing;
    if (query_group_ && rules_.same_group == SameGroup::kExclude)
      for (const int64_t j : groups_.of(query_group_[i])) row[j] = kNothing;
    return k_.to_logits(row, logit_factor_.data(), T(rules_.scale), num_similarities_);
  }

  // The row's own negative and, where several are positives, the others, taken out of the row before the softmax.
  struct Apart {
    T own_logit = -std::numeric_limits<T>::infinity();  // with its bias
    T own_similarity = -std::numeric_limits<T>::infinity();
    std::vector<std::pair<int64_t, T>> positives;  // column, logit

    double shift(const Positive& p) const {  // the positive's logit minus the mean logit of all positives
      double sum = 0;
      for (const auto& [column, logit] : positives) sum += p.logit - double(logit);
      return sum / double(1 + positives.size());
    }
  };
  Apart take_apart(int64_t i, T* row, const Positive& positive) {
    constexpr T kNothing = -std::numeric_limits<T>::infinity();
    Apart apart;
    if (first_own_ >= 0) {
      const int64_t j = first_own_ + i;
      apart.own_similarity = row[j] * column_factor_[j];
      apart.own_logit = T(apart.own_similarity * rules_.scale + rules_.hard_negative_weight);
      row[j] = kNothing;
    }
    if (query_group_ && rules_.same_group == SameGroup::kPositive)
      for (const int64_t j : groups_.of(query_group_[i]))
        if (j != positive.column) {
          apart.positives.emplace_back(j, T(row[j] * column_factor_[j] * rules_.scale));
          row[j] = kNothing;
        }
    return apart;
  }

  // One row of the loss in one direction: statistics, and ∂loss/∂(k_j · q̂) in place of the row where wanted.
  void one_direction(int64_t i, int64_t r, T* row, MixingRow* mixing) {
    const Positive positive = find_positive(i);
    const Apart apart = take_apart(i, row, positive);
    T best = mask_and_scale(i, row, positive);
    out_.positive[i] = T(positive.similarity);
    out_.hardest[i] = std::max(T(best / T(rules_.scale)), apart.own_similarity);

    best = std::max({best, T(positive.logit), apart.own_logit});
    T *extra = row + num_similarities_, *mixed = extra + num_extra_;
    const T query_factor = unit_query_.factor(i);
    if (mixing) best = std::max(best, mixing->mix(i, query_factor, T(rules_.scale), row, mixed));
    for (const auto& [column, logit] : apart.positives) row[column] = logit, best = std::max(best, logit);
    for (int64_t e = 0; e < num_extra_; ++e) {
      extra[e] = extra_[i * num_extra_ + e];
      best = std::max(best, extra[e]);
    }

    double moment = 0;
    const T* factors = column_factor_.data();
    const auto exponentials = [&](T* from, int64_t count) {
      if (!wanted_.scale) return k_.exp_in_place(from, factors + (from - row), best, count);
      T part = 0;
      const T total = k_.exp_in_place_with_moment(from, factors + (from - row), best, count, &part);
      moment += double(part);
      return total;
    };
    double similar = exponentials(row, num_similarities_);
    if (mixing) similar += exponentials(mixed, num_columns_ - num_similarities_ - num_extra_);
    const double beyond = num_extra_ ? double(k_.exp_in_place(extra, factors + num_similarities_, best, num_extra_)) : 0.0;
    const double own = std::exp(double(apart.own_logit) - double(best));
    const double negative_lse = double(best) + std::log(similar + beyond + own);
    out_.negative_lse[i] = T(negative_lse);
    out_.loss[i] = T(log1p_exp(negative_lse - positive.logit) + apart.shift(positive));
    if (!wanted_.any()) return;

    // The row now holds e^(ℓ − best) · ‖k‖⁻¹; `factor` times that is weight · probability · ‖k‖⁻¹.
    const double lse = logaddexp(negative_lse, positive.logit), weight = row_weight(i);
    const double share = 1.0 / double(1 + apart.positives.size()), to_probability = std::exp(double(best) - lse);
    const double factor = weight * to_probability;
    row_factor_[r] = T(factor * rules_.scale);
    positive_entry_[r] = ((1 - share) - std::exp(negative_lse - lse)) * positive.slope / to_probability;
    if (wanted_.scale) {  // Σ_j weight_j (ℓ_j − ℓ_positive), which doesn't cancel where the loss is small
      const double own_term = own > 0 ? own * (double(apart.own_logit) - rules_.hard_negative_weight - positive.logit) : 0;
      const double to_best = double(best) - positive.logit;
      moment_[i] = factor * (moment + to_best * similar + own_term - positive.logit * beyond) +
                   weight * apart.shift(positive);
    }
    if (first_own_ >= 0) row[first_own_ + i] = T(own) * factors[first_own_ + i];
    for (const auto& [column, logit] : apart.positives) row[column] -= T(share / to_probability) * factors[column];
    if (mixing) mixing->differentiate(i, r, query_factor, row_factor_[r], mixed, row);
    if (out_.extra_gradient)
      for (int64_t e = 0; e < num_extra_; ++e) out_.extra_gradient[i * num_extra_ + e] = T(factor * extra[e]);
  }

  // dQ = A K and dK = Aᵀ Q̂ with A = ∂loss/∂(k_j · q̂) of the block, which is row_factor times what `logits` holds.
  // The positives' entries are added apart, in full precision.
  void products(int64_t first, int64_t count) {
    const int64_t d = query_.columns;
    if (out_.query_gradient) {
      T* gradient = out_.query_gradient + first * d;
      bool accumulate = false;
      for (const Segment<T>& s : segments_) {
        if (s.unit.count() == 0) continue;
        matmul(Matrix<T>{gradient, count, d, d}, slope(s, count), Matrix<const T>{s.unit.row(0), s.unit.count(), d, d},
               accumulate);
        accumulate = true;
      }
      finish_query_gradient(first, count, gradient);
    }
    if (!wanted_.key && !wanted_.negatives) return;
    each_block_row(count, [&](int64_t r, T* unit_query) { k_.scale(unit_query, row_factor_[r], unit_query, d); });
    for (const Segment<T>& s : segments_)
      if (s.gradient && s.unit.count())
        matmul(Matrix<T>{s.gradient, s.unit.count(), d, d}, slope(s, count).transposed(), unit_block(count), first > 0);
    if (!wanted_.key) return;
    add_positives(first, count, segments_[0].gradient);
    if (mixing_) mixing_->add_to(segments_[0].gradient, first, first + count);
  }
  Matrix<T> slope(const Segment<T>& s, int64_t count) {
    return {logits_ + s.first, count, s.unit.count(), row_stride_};
  }

  // Adds the positive's part and goes through the normalisation.
  void finish_query_gradient(int64_t first, int64_t count, T* query_gradient) {
    const int64_t d = query_.columns;
    const UnitRows<T>& keys = segments_[0].unit;
    each_block_row(count, [&](int64_t r, const T* unit_query) {
      const int64_t i = first + r, j = target(i);
      T* gradient = query_gradient + r * d;
      const double along = double(k_.dot(unit_query, gradient, d)) + positive_entry_[r] * double(out_.positive[i]);
      const double factor = double(unit_query_.factor(i)) * double(row_factor_[r]);
      const double radial = unit_query_.has_constant_norm(i) ? 0.0 : -along;
      k_.combine(gradient, T(factor), T(factor * positive_entry_[r]) * keys.factor(j), keys.row(j), T(factor * radial),
                 unit_query, d);
    });
  }

  // Several rows may share a positive, so threads share out the dimensions and not the rows.
  void add_positives(int64_t first, int64_t count, T* key_gradient) {
    const int64_t d = query_.columns;
    const UnitRows<T>& keys = segments_[0].unit;
    torch::stable::parallel_for(0, d, std::max<int64_t>(16, kGrain / count), [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t j = target(first + r);
        k_.add_scaled(unit_block_ + r * d + begin, T(positive_entry_[r]) * keys.factor(j),
                      key_gradient + j * d + begin, end - begin);
      }
    });
  }

  void finish_gradients() {
    for (const Segment<T>& s : segments_)
      if (s.gradient) s.unit.project_all(s.gradient, mixing_ && s.first == 0 ? mixing_->kept() : nullptr);
    if (out_.scale_gradient) {
      double total = 0;
      for (const double m : moment_) total += m;
      *out_.scale_gradient = T(total / rules_.scale);
    }
  }

  // --- both directions ------------------------------------------------------------------------------------------------

  void prepare_both_directions() {
    positive_.resize(query_.rows);
    column_best_.assign(num_columns_, -std::numeric_limits<T>::infinity());
    column_total_.assign(num_columns_, T(0));
    full_row_lse_.resize(query_.rows);
    full_column_lse_.resize(num_columns_);
    column_weight_.resize(num_columns_);
  }

  void symmetric_statistics(int64_t i, T* row) {
    const Positive positive = positive_[i] = find_positive(i);
    const T best = mask_and_scale(i, row, positive);
    out_.positive[i] = T(positive.similarity);
    out_.hardest[i] = best / T(rules_.scale);
    const T offset = std::max(best, T(positive.logit));
    const double negative_lse = double(offset) + std::log(double(k_.exp_sum(row, offset, num_columns_)));
    out_.negative_lse[i] = T(negative_lse);
    full_row_lse_[i] = logaddexp(negative_lse, positive.logit);
  }

  void column_statistics(int64_t count) {
    constexpr int64_t kSlice = 256;
    const int64_t slices = (num_columns_ + kSlice - 1) / kSlice;
    torch::stable::parallel_for(0, slices, std::max<int64_t>(1, kGrain / (kSlice * count)), [&](int64_t s0, int64_t s1) {
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t j = s * kSlice, width = std::min(kSlice, num_columns_ - j);
        T before[kSlice];
        T *best = column_best_.data() + j, *total = column_total_.data() + j;
        std::copy(best, best + width, before);
        for (int64_t r = 0; r < count; ++r) k_.column_max(logits(r) + j, best, width);
        for (int64_t c = 0; c < width; ++c)
          if (before[c] != best[c]) total[c] *= std::exp(before[c] - best[c]);
        for (int64_t r = 0; r < count; ++r) k_.column_exp_sum(logits(r) + j, best, total, width);
      }
    });
  }

  void second_sweep(int64_t block) {
    const int64_t n = query_.rows;
    for (int64_t j = 0; j < n; ++j) {
      const double column_lse = double(column_best_[j]) + std::log(double(column_total_[j]));
      const double logit = positive_[j].logit, row_lse = double(out_.negative_lse[j]);
      out_.column_lse[j] = T(column_lse);
      out_.loss[j] = T((log1p_exp(row_lse - logit) + log1p_exp(column_lse - logit)) / 2);
      full_column_lse_[j] = T(logaddexp(column_lse, logit));
    }
    if (!wanted_.any()) return;
    for (int64_t j = 0; j < n; ++j) column_weight_[j] = T(row_weight(j) / 2);
    for (int64_t first = 0; first < n; first += block) {
      const int64_t count = std::min(block, n - first);
      if (count < n) similarities(first, count);  // a single block still holds its logits
      each_row(first, count, [&](int64_t i, T* row) {
        const Positive& positive = positive_[i];
        if (count < n) mask_and_scale(i, row, positive);
        const double weight = row_weight(i) / 2;
        const double moment = k_.symmetric_weigh(row, T(full_row_lse_[i]), T(weight), full_column_lse_.data(),
                                                 column_weight_.data(), column_factor_.data(), T(rules_.scale), num_columns_);
        const double positive_weight =
            -weight * (std::exp(double(out_.negative_lse[i]) - full_row_lse_[i]) +
                       std::exp(double(out_.column_lse[i]) - logaddexp(out_.column_lse[i], positive.logit)));
        row_factor_[i - first] = T(1);
        positive_entry_[i - first] = positive_weight * positive.slope * rules_.scale;
        moment_[i] = moment + positive_weight * positive.logit;
      });
      products(first, count);
    }
  }

  const RowKernels<T>& k_ = row_kernels<T>();
  Matrix<const T> query_;
  UnitRows<T> unit_query_;
  Rules rules_;
  Outputs<T> out_;
  Wanted wanted_;

  std::vector<Segment<T>> segments_;  // the first holds the keys
  std::vector<T> column_factor_, logit_factor_;
  int64_t num_similarities_ = 0, num_extra_ = 0, num_columns_ = 0, row_stride_ = 0, first_own_ = -1;
  const T *extra_ = nullptr, *row_weight_ = nullptr;
  double common_weight_ = 1;
  const int64_t *target_ = nullptr, *query_group_ = nullptr;
  GroupIndex groups_;
  std::optional<MixingRules> mixing_rules_;
  std::optional<BlockMixing<T>> mixing_;
  std::vector<T> padded_keys_;

  T *logits_ = nullptr, *unit_block_ = nullptr;            // (R, row stride), (R, D); in the workspace of `run`
  std::vector<T> row_factor_;                              // (R,) what ∂loss/∂(k_j · q̂) is of the row's entries
  std::vector<double> positive_entry_;                     // (R,) the positive's entry, without ‖k‖⁻¹
  std::vector<double> moment_;                             // (N,) each row's part of the scale's gradient
  std::vector<Positive> positive_;                         // (N,) kept for the second sweep
  std::vector<T> column_best_, column_total_, full_column_lse_, column_weight_;
  std::vector<double> full_row_lse_;
  int64_t block_first_ = 0;
};

void check_target(const OptionalTensor& target, int64_t num_keys) {
  if (!target) return;
  const int64_t* t = target->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target->size(0); ++i)
    STD_TORCH_CHECK(t[i] >= 0 && t[i] < num_keys, "target: expected indices of keys, 0 to ", num_keys - 1, ", got ", t[i]);
}

using Result =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Mixing {
  const OptionalTensor& pairs;
  int64_t k;
  double alpha;
};

template <typename T>
Result run(const Tensor& query, const Tensor& key, const OptionalTensor& target, const OptionalTensor& negatives,
           const OptionalTensor& bank, const OptionalTensor& extra_logits, const OptionalTensor& query_group,
           const OptionalTensor& key_group, const OptionalTensor& loss_grad, double row_weight, const Rules& rules,
           const Mixing& mixing, Wanted wanted) {
  const int64_t n = query.size(0), m = key.size(0), d = query.size(1), p = count(negatives);
  const int64_t e = extra_logits ? extra_logits->size(1) : 0;
  Tensor loss = new_tensor<T>({n}), negative_lse = new_tensor<T>({n}), positive = new_tensor<T>({n}),
         hardest = new_tensor<T>({n}), column_lse = new_tensor<T>({rules.symmetric ? m : 0}), total = new_tensor<T>({});
  const auto gradient = [](bool is_wanted, int64_t rows, int64_t columns) {
    return is_wanted ? new_tensor<T>({rows, columns}) : new_tensor<T>({0});
  };
  Tensor query_grad = gradient(wanted.query, n, d), key_grad = gradient(wanted.key, m, d),
         negatives_grad = gradient(wanted.negatives, p, d), extra_grad = gradient(wanted.extra_logits, n, e),
         scale_grad = wanted.scale ? new_tensor<T>({}) : new_tensor<T>({0});
  Tensor hard_negatives = new_tensor<int64_t>({mixing.pairs ? n : 0, mixing.k});
  const auto pointer = [](bool is_wanted, Tensor& t) { return is_wanted ? data<T>(t) : nullptr; };

  Sweep<T> sweep({query.const_data_ptr<T>(), n, d, d}, rules,
                 {data<T>(loss), data<T>(negative_lse), data<T>(column_lse), data<T>(positive), data<T>(hardest),
                  data<T>(total), pointer(wanted.query, query_grad), pointer(wanted.extra_logits, extra_grad),
                  pointer(wanted.scale, scale_grad)},
                 wanted);
  sweep.add_segment(key.const_data_ptr<T>(), m, pointer(wanted.key, key_grad));
  sweep.add_segment(data<T>(negatives), p, pointer(wanted.negatives, negatives_grad));
  sweep.add_segment(data<T>(bank), count(bank), nullptr);
  sweep.set_own_negatives(m);
  sweep.set_target(data<int64_t>(target));
  sweep.set_extra(data<T>(extra_logits), e);
  sweep.set_groups(data<int64_t>(query_group), data<int64_t>(key_group));
  if (mixing.pairs)
    sweep.set_mixing({data<int64_t>(mixing.pairs), data<int64_t>(hard_negatives), mixing.pairs->size(1), mixing.k,
                      mixing.alpha});
  sweep.set_row_weight(row_weight, data<T>(loss_grad));
  sweep.run();
  return {loss,       negative_lse, column_lse,     positive,   hardest,   total,
          query_grad, key_grad,     negatives_grad, extra_grad, scale_grad, hard_negatives};
}

Result info_nce(const Tensor& query, const Tensor& key, const OptionalTensor& target, const OptionalTensor& negatives,
                const OptionalTensor& bank, const OptionalTensor& extra_logits, const OptionalTensor& query_group,
                const OptionalTensor& key_group, const OptionalTensor& loss_grad, double row_weight, double scale,
                double hard_negative_weight,
                int64_t same_group, double margin, bool symmetric, const OptionalTensor& mixed_pairs, int64_t k,
                double alpha, int64_t wanted) {
  check_target(target, key.size(0));
  const Rules rules{scale, hard_negative_weight, SameGroup(same_group), margin, symmetric};
  const auto run_typed = query.scalar_type() == ScalarType::Double ? run<double> : run<float>;
  return run_typed(query, key, target, negatives, bank, extra_logits, query_group, key_group, loss_grad, row_weight, rules,
                   {mixed_pairs, k, alpha}, Wanted(wanted));
}

std::string capability() { return cpu_capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "info_nce(Tensor query, Tensor key, Tensor? target, Tensor? negatives, Tensor? bank, Tensor? extra_logits, "
      "Tensor? query_group, Tensor? key_group, Tensor? loss_grad, float row_weight, float scale, float hard_negative_weight, "
      "int same_group, float margin, bool symmetric, Tensor? mixed_pairs, int k, float alpha, int wanted) -> "
      "(Tensor loss, Tensor negative_lse, Tensor column_lse, Tensor positive, Tensor hardest, Tensor total, "
      "Tensor query_grad, Tensor key_grad, Tensor negatives_grad, Tensor extra_logits_grad, Tensor scale_grad, "
      "Tensor hard_negatives)");
  m.def("capability() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) { m.impl("info_nce", TORCH_BOX(&info_nce)); }
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CompositeExplicitAutograd, m) { m.impl("capability", TORCH_BOX(&capability)); }

}  // namespace hicl
