// Which keys are in a row's group: the keys' indices sorted by group, so that a row finds its own in O(log M).
#pragma once
#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace hicl {

class GroupIndex {
 public:
  GroupIndex() = default;
  GroupIndex(const int64_t* key_group, int64_t num_keys) : group_(num_keys), column_(num_keys) {
    std::vector<std::pair<int64_t, int64_t>> sorted(num_keys);
    for (int64_t j = 0; j < num_keys; ++j) sorted[j] = {key_group[j], j};
    if (!std::is_sorted(sorted.begin(), sorted.end())) std::sort(sorted.begin(), sorted.end());
    for (int64_t j = 0; j < num_keys; ++j) std::tie(group_[j], column_[j]) = sorted[j];
  }

  struct Columns {
    const int64_t *first, *last;
    const int64_t* begin() const { return first; }
    const int64_t* end() const { return last; }
    int64_t size() const { return last - first; }
  };
  Columns of(int64_t group) const {
    const auto [low, high] = std::equal_range(group_.begin(), group_.end(), group);
    return {column_.data() + (low - group_.begin()), column_.data() + (high - group_.begin())};
  }

 private:
  std::vector<int64_t> group_, column_;
};

}  // namespace hicl
