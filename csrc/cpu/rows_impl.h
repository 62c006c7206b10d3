// The row kernels themselves. Included once per instruction set, with HICL_ISA naming it.
#pragma once
#include "rows.h"
#include "vec.h"

namespace hicl {
namespace HICL_ISA {
namespace {

constexpr float kNothing = -__builtin_huge_valf();

template <typename T>
T dot(const T* a, const T* b, int64_t d) {
  constexpr int W = kWidth<T>;
  Vec<T> even{}, odd{};  // two sums in flight: one addition waits for the one before
  int64_t i = 0;
  for (; i + 2 * W <= d; i += 2 * W) {
    even += load(a + i) * load(b + i);
    odd += load(a + i + W) * load(b + i + W);
  }
  for (; i + W <= d; i += W) even += load(a + i) * load(b + i);
  if (i < d) odd += load_head(a + i, d - i, T(0)) * load_head(b + i, d - i, T(0));
  return sum<T>(even + odd);
}

// Several products with one row, which is loaded once for all of them.
template <int kCount, typename T>
inline void dots_at_once(const T* x, const T* const* y, T* out, int64_t d) {
  constexpr int W = kWidth<T>;
  Vec<T> even[kCount] = {}, odd[kCount] = {};
  int64_t i = 0;
  for (; i + 2 * W <= d; i += 2 * W) {
    const Vec<T> first = load(x + i), second = load(x + i + W);
    for (int t = 0; t < kCount; ++t) {
      even[t] += first * load(y[t] + i);
      odd[t] += second * load(y[t] + i + W);
    }
  }
  for (; i < d; i += W) {
    const int64_t n = d - i < W ? d - i : W;
    const Vec<T> first = load_head(x + i, n, T(0));
    for (int t = 0; t < kCount; ++t) even[t] += first * load_head(y[t] + i, n, T(0));
  }
  for (int t = 0; t < kCount; ++t) out[t] = sum<T>(even[t] + odd[t]);
}

template <typename T>
void dots(const T* x, const T* const* y, int64_t count, T* out, int64_t d) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) dots_at_once<4>(x, y + t, out + t, d);
  if (count - t >= 2) dots_at_once<2>(x, y + t, out + t, d), t += 2;
  if (t < count) out[t] = dot(x, y[t], d);
}

// Applies `f` to a row in vectors; the last, partial one is padded with `fill`.
template <typename T, typename F>
inline void update(T* row, int64_t n, T fill, F f) {
  constexpr int W = kWidth<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) store(row + j, f(load(row + j), j, int64_t(W)));
  if (j < n) store_head(row + j, f(load_head(row + j, n - j, fill), j, n - j), n - j);
}
template <typename T>
inline Vec<T> part(const T* p, int64_t j, int64_t n) {
  return n == kWidth<T> ? load(p + j) : load_head(p + j, n, T(0));
}

template <typename T>
void scale(const T* x, T factor, T* out, int64_t d) {
  update(out, d, T(0), [=](Vec<T>, int64_t j, int64_t n) { return part(x, j, n) * factor; });
}

template <typename T>
void add_scaled(const T* x, T factor, T* y, int64_t d) {
  update(y, d, T(0), [=](Vec<T> v, int64_t j, int64_t n) { return v + part(x, j, n) * factor; });
}

// In strips of a few vectors, which stay in registers while all rows are added.
template <typename T>
void add_rows(T* y, const T* const* x, const T* factor, int64_t count, int64_t from, int64_t d) {
  constexpr int W = kWidth<T>, kStrip = 4;
  int64_t i = 0;
  for (; i + kStrip * W <= d; i += kStrip * W) {
    Vec<T> strip[kStrip];
    for (int s = 0; s < kStrip; ++s) strip[s] = load(y + i + s * W);
    for (int64_t t = 0; t < count; ++t) {
      const T* row = x[t] + from + i;
      for (int s = 0; s < kStrip; ++s) strip[s] += load(row + s * W) * factor[t];
    }
    for (int s = 0; s < kStrip; ++s) store(y + i + s * W, strip[s]);
  }
  for (int64_t t = 0; t < count; ++t) add_scaled(x[t] + from + i, factor[t], y + i, d - i);
}

template <typename T>
void sum_of_two(T* out, T a, const T* x, T b, const T* y, int64_t d) {
  constexpr int W = kWidth<T>;
  int64_t i = 0;
  for (; i + W <= d; i += W) store(out + i, load(x + i) * a + load(y + i) * b);
  if (i < d) store_head(out + i, load_head(x + i, d - i, T(0)) * a + load_head(y + i, d - i, T(0)) * b, d - i);
}

template <typename T>
void combine(T* gradient, T g, T a, const T* x, T b, const T* y, int64_t d) {
  update(gradient, d, T(0), [=](Vec<T> v, int64_t j, int64_t n) { return v * g + part(x, j, n) * a + part(y, j, n) * b; });
}

// `logits_of` has (values, their columns' factors) for an argument.
template <typename T, typename F>
T each_logit(T* row, const T* column_scale, int64_t n, F logits_of) {
  Vec<T> best = splat(T(kNothing));
  update(row, n, T(0), [&](Vec<T> v, int64_t j, int64_t m) {
    const Vec<T> logit = logits_of(v, part(column_scale, j, m));
    if (m == kWidth<T>) {
      best = larger<T>(best, logit);
    } else {
      for (int64_t i = 0; i < m; ++i) best[0] = logit[i] > best[0] ? logit[i] : best[0];
    }
    return logit;
  });
  return largest<T>(best);
}

template <typename T>
T to_logits(T* row, const T* column_scale, T factor, int64_t n) {
  return each_logit(row, column_scale, n, [=](Vec<T> v, Vec<T> scale) { return v * (scale * factor); });
}

template <typename T>
T to_logits_below(T* row, const T* column_scale, T factor, T limit, int64_t n) {
  return each_logit(row, column_scale, n, [=](Vec<T> v, Vec<T> scale) {
    const Vec<T> similarity = v * scale;
    return similarity > limit ? splat(T(kNothing)) : similarity * factor;
  });
}

template <typename T>
T exp_in_place(T* row, const T* column_scale, T offset, int64_t n) {
  Vec<T> total{};
  update(row, n, T(kNothing), [&](Vec<T> v, int64_t j, int64_t m) {
    const Vec<T> e = exp<T>(v - offset);
    total += e;
    return e * part(column_scale, j, m);
  });
  return sum<T>(total);
}

template <typename T>
T exp_in_place_with_moment(T* row, const T* column_scale, T offset, int64_t n, T* moment) {
  Vec<T> total{}, weighted{};
  update(row, n, T(kNothing), [&](Vec<T> v, int64_t j, int64_t m) {
    const Vec<T> x = v - offset;
    const Vec<T> e = exp<T>(x);
    total += e;
    weighted += e == T(0) ? e : e * x;  // 0 · −inf has no place in the sum
    return e * part(column_scale, j, m);
  });
  *moment = sum<T>(weighted);
  return sum<T>(total);
}

template <typename T>
T exp_sum(const T* row, T offset, int64_t n) {
  constexpr int W = kWidth<T>;
  Vec<T> total{};
  int64_t j = 0;
  for (; j + W <= n; j += W) total += exp<T>(load(row + j) - offset);
  if (j < n) total += exp<T>(load_head(row + j, n - j, T(kNothing)) - offset);
  return sum<T>(total);
}

template <typename T>
T exp_of_difference(T* row, T offset, T scale, int64_t n) {
  Vec<T> total{};
  update(row, n, T(kNothing), [&](Vec<T> v, int64_t, int64_t) {
    const Vec<T> e = exp<T>((v - offset) * scale);
    total += e;
    return e;
  });
  return sum<T>(total);
}

// The largest of each part of a row first: only the best part is searched for the place.
template <typename T>
T largest(const T* row, int64_t n, int64_t* index) {
  constexpr int W = kWidth<T>;
  constexpr int64_t kPart = 256;
  Bits<T> is_nan{};
  T best = T(kNothing);
  int64_t where = 0;
  for (int64_t begin = 0; begin < n; begin += kPart) {
    const int64_t end = begin + kPart < n ? begin + kPart : n;
    Vec<T> even = splat(T(kNothing)), odd = even;
    int64_t j = begin;
    for (; j + 2 * W <= end; j += 2 * W) {
      const Vec<T> a = load(row + j), b = load(row + j + W);
      is_nan |= (a != a) | (b != b);
      even = larger<T>(a, even);
      odd = larger<T>(b, odd);
    }
    for (; j < end; j += W) {
      const Vec<T> a = load_head(row + j, end - j < W ? end - j : W, T(kNothing));
      is_nan |= a != a;
      even = larger<T>(a, even);
    }
    const T found = hicl::HICL_ISA::largest<T>(larger<T>(even, odd));
    if (found > best) best = found, where = begin;
  }
  bool has_nan = false;
  for (int i = 0; i < W; ++i) has_nan |= is_nan[i] != 0;
  *index = has_nan ? 0 : where;
  while (has_nan ? row[*index] == row[*index] : row[*index] != best) ++*index;
  return row[*index];
}

// Where v is larger than the best so far, it is the best, and r is its place.
template <typename T>
inline void offer(Vec<T> v, RowIndex<T> r, Vec<T>& best, Bits<T>& at) {
  const Bits<T> better = (v > best) | ((v != v) & (best == best));
  best = better ? v : best;
  at = better ? Bits<T>{} + r : at;
}

// A few rows at a time, so that what is best is loaded and stored once for all of them.
template <typename T>
void column_largest(const T* rows, int64_t stride, int64_t count, T* best, RowIndex<T>* at, int64_t n) {
  constexpr int W = kWidth<T>, kRows = 4;
  for (int64_t r = 0; r < count; r += kRows) {
    const int64_t end = r + kRows < count ? r + kRows : count;
    for (int64_t j = 0; j < n; j += W) {
      const int64_t m = n - j < W ? n - j : W;
      Vec<T> value = part(best, j, m);
      Bits<T> place{};
      __builtin_memcpy(&place, at + j, m == W ? sizeof place : m * sizeof(RowIndex<T>));
      for (int64_t i = r; i < end; ++i) offer<T>(part(rows + i * stride, j, m), i, value, place);
      if (m == W) {
        store(best + j, value);
        __builtin_memcpy(at + j, &place, sizeof place);
      } else {
        store_head(best + j, value, m);
        __builtin_memcpy(at + j, &place, m * sizeof(RowIndex<T>));
      }
    }
  }
}

template <typename T>
void column_max(const T* row, T* best, int64_t n) {
  update(best, n, T(0), [=](Vec<T> v, int64_t j, int64_t m) { return larger<T>(v, part(row, j, m)); });
}

template <typename T>
void column_exp_sum(const T* row, const T* best, T* total, int64_t n) {
  update(total, n, T(0), [=](Vec<T> v, int64_t j, int64_t m) {
    const Vec<T> logit = part(row, j, m);
    // A column that is left out everywhere has no maximum to subtract.
    return v + (logit == T(kNothing) ? Vec<T>{} : exp<T>(logit - part(best, j, m)));
  });
}

template <typename T>
T symmetric_weigh(T* row, T row_lse, T row_weight, const T* column_lse, const T* column_weight, const T* column_scale,
                  T factor, int64_t n) {
  Vec<T> moment{};
  update(row, n, T(kNothing), [&](Vec<T> v, int64_t j, int64_t m) {
    const Vec<T> by_row = exp<T>(v - row_lse) * row_weight;
    const Vec<T> by_column = exp<T>(v - part(column_lse, j, m)) * part(column_weight, j, m);
    const Vec<T> slope = by_row + by_column;
    moment += slope == T(0) ? slope : slope * v;
    return slope * (part(column_scale, j, m) * factor);
  });
  return sum<T>(moment);
}

template <typename T>
constexpr RowKernels<T> table() {
  return {dot<T>,
          dots<T>,
          scale<T>,
          add_scaled<T>,
          add_rows<T>,
          sum_of_two<T>,
          combine<T>,
          to_logits<T>,
          to_logits_below<T>,
          exp_in_place<T>,
          exp_in_place_with_moment<T>,
          exp_sum<T>,
          exp_of_difference<T>,
          largest<T>,
          column_largest<T>,
          column_max<T>,
          column_exp_sum<T>,
          symmetric_weigh<T>};
}

}  // namespace

extern const RowKernels<float> kFloat = table<float>();
extern const RowKernels<double> kDouble = table<double>();

}  // namespace HICL_ISA
}  // namespace hicl
