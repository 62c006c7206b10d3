// Which columns are in a row's group: their indices sorted by group, so that a row finds its own in O(log C).
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
  // Column j's group is group[j · stride].
  GroupIndex(const int64_t* group, int64_t num_columns, int64_t stride = 1) : group_(num_columns), column_(num_columns) {
    std::vector<std::pair<int64_t, int64_t>> sorted(num_columns);
    for (int64_t j = 0; j < num_columns; ++j) sorted[j] = {group[j * stride], j};
    if (!std::is_sorted(sorted.begin(), sorted.end())) std::sort(sorted.begin(), sorted.end());
    for (int64_t j = 0; j < num_columns; ++j) std::tie(group_[j], column_[j]) = sorted[j];
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
