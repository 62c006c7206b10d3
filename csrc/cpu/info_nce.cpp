// InfoNCE over cosine similarities as an operator; the work is in info_nce_sweep.h.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "checks.h"
#include "info_nce_sweep.h"
#include "tensors.h"

namespace hicl {
namespace {

using Result =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Mixing {
  const OptionalTensor& pairs;
  int64_t k;
  double alpha;
};

void check_arguments(const Tensor& query, const Tensor& key, const OptionalTensor& target, const OptionalTensor& negatives,
                     const OptionalTensor& bank, const OptionalTensor& extra_logits, const OptionalTensor& query_group,
                     const OptionalTensor& key_group, const OptionalTensor& loss_grad, const Rules& rules,
                     const Mixing& mixing) {
  const TensorChecks check("info_nce", query);
  const ScalarType type = sum_type(check, "query", query);
  const int64_t n = query.size(0), d = query.size(1);
  check("query", query, type, {n, d});
  check.that(n > 0 && d > 0, "query", "expected at least one row and one dimension, got ", n, " and ", d);
  check("key", key, type, {kAny, d});
  const int64_t m = key.size(0);
  check("target", target, ScalarType::Long, {n});
  check_range(check, "target", target, 0, m, "indices of keys");
  check.that(target || n <= m, "key", "expected at least ", n, " rows, one for each query, or a target, got ", m);
  check("negatives", negatives, type, {kAny, d});
  check("bank", bank, type, {kAny, d});
  check("extra_logits", extra_logits, type, {n, kAny});
  check.groups(query_group, n, key_group, m);
  check("loss_grad", loss_grad, type, {n});
  check.that(rules.hard_negative_weight == 0 || count(negatives) >= n, "negatives", "expected at least ", n,
             " rows, since they have a weight of their own, got ", count(negatives));
  if (rules.symmetric) {
    check.that(n == m, "symmetric", "expected as many queries as keys, got ", n, " and ", m);
    check.that(!target && !negatives && !bank && !extra_logits && !mixing.pairs, "symmetric",
               "expected no target, negatives, bank, extra logits or mixing");
  }
  if (!mixing.pairs) return;
  check.that(0 < mixing.k && mixing.k <= m, "k", "expected 1 to ", m, ", got ", mixing.k);
  check("mixed_pairs", mixing.pairs, ScalarType::Long, {n, kAny, 2});
  check_range(check, "mixed_pairs", mixing.pairs, 0, mixing.k, "places among the k");
}

template <typename T>
Result run(const Tensor& query, const Tensor& key, const OptionalTensor& target, const OptionalTensor& negatives,
           const OptionalTensor& bank, const OptionalTensor& extra_logits, const OptionalTensor& query_group,
           const OptionalTensor& key_group, const OptionalTensor& loss_grad, double row_weight, const Rules& rules,
           const Mixing& mixing, Wanted wanted, int64_t block_bytes) {
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
  Tensor hard_negatives = new_tensor<int64_t>({mixing.pairs ? n : 0, mixing.pairs ? mixing.k : 0});
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
  sweep.run(block_bytes);
  return {loss,       negative_lse, column_lse,     positive,   hardest,   total,
          query_grad, key_grad,     negatives_grad, extra_grad, scale_grad, hard_negatives};
}

Result info_nce(const Tensor& query, const Tensor& key, const OptionalTensor& target, const OptionalTensor& negatives,
                const OptionalTensor& bank, const OptionalTensor& extra_logits, const OptionalTensor& query_group,
                const OptionalTensor& key_group, const OptionalTensor& loss_grad, double row_weight, double scale,
                double hard_negative_weight, int64_t same_group, double margin, bool symmetric,
                const OptionalTensor& mixed_pairs, int64_t k, double alpha, int64_t wanted, int64_t block_bytes) {
  const Rules rules{scale, hard_negative_weight, SameGroup(same_group), margin, symmetric};
  const Mixing mixing{mixed_pairs, k, alpha};
  check_arguments(query, key, target, negatives, bank, extra_logits, query_group, key_group, loss_grad, rules, mixing);
  const auto run_typed = query.scalar_type() == ScalarType::Double ? run<double> : run<float>;
  return run_typed(query, key, target, negatives, bank, extra_logits, query_group, key_group, loss_grad, row_weight, rules,
                   mixing, Wanted(wanted), block_bytes);
}

std::string capability() { return cpu_capability(); }
std::string capabilities() { return cpu_capabilities(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def(
      "info_nce(Tensor query, Tensor key, Tensor? target, Tensor? negatives, Tensor? bank, Tensor? extra_logits, "
      "Tensor? query_group, Tensor? key_group, Tensor? loss_grad, float row_weight, float scale, float hard_negative_weight, "
      "int same_group, float margin, bool symmetric, Tensor? mixed_pairs, int k, float alpha, int wanted, int block_bytes=134217728) -> "
      "(Tensor loss, Tensor negative_lse, Tensor column_lse, Tensor positive, Tensor hardest, Tensor total, "
      "Tensor query_grad, Tensor key_grad, Tensor negatives_grad, Tensor extra_logits_grad, Tensor scale_grad, "
      "Tensor hard_negatives)");
  m.def("capability() -> str");
  m.def("capabilities() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CPU, m) { m.impl("info_nce", TORCH_BOX(&info_nce)); }
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("capabilities", TORCH_BOX(&capabilities));
}

}  // namespace hicl
