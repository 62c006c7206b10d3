// What an operator's memory accesses rest on: ranks, sizes, types, contiguity and devices of its tensors. An operator can be
// called by anyone, with anything; whatever isn't as it must be is refused by name before a byte is read.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

namespace hicl {

constexpr int64_t kAny = -1;  // a size that may be anything

inline const char* type_name(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(type);
  }
}

// Of the tensors of one call, all on the device of the first.
class TensorChecks {
 public:
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;
  using Shape = std::initializer_list<int64_t>;

  TensorChecks(const char* op, const Tensor& first) : operator_(op), device_(first.device()) {}

  // A contiguous tensor of that shape and type.
  void operator()(const char* name, const Tensor& t, ScalarType type, Shape shape) const {
    if (t.scalar_type() == type && fits(t, shape) && t.is_contiguous() && t.device() == device_) return;
    refuse(name, t, std::string("a contiguous tensor of ") + type_name(type), shape);
  }
  void operator()(const char* name, const std::optional<Tensor>& t, ScalarType type, Shape shape) const {
    if (t) (*this)(name, *t, type, shape);
  }
  // One of any of these types, and of any strides.
  void of_any(const char* name, const Tensor& t, std::initializer_list<ScalarType> types, Shape shape) const {
    bool is_one = false;
    for (const ScalarType type : types) is_one |= t.scalar_type() == type;
    if (is_one && fits(t, shape) && t.device() == device_) return;
    std::string names;
    for (const ScalarType type : types) names += (names.empty() ? "" : " or ") + std::string(type_name(type));
    refuse(name, t, "a tensor of " + names, shape);
  }
  // Anything else: what must hold, and in words what was expected of what.
  template <typename... Words>
  void that(bool holds, const char* name, const Words&... words) const {
    if (!holds) fail(name, words...);
  }
  // Groups of rows and of columns: both or neither.
  void groups(const std::optional<Tensor>& of_rows, int64_t num_rows, const std::optional<Tensor>& of_columns,
              int64_t num_columns) const {
    (*this)("query_group", of_rows, ScalarType::Long, {num_rows});
    (*this)("key_group", of_columns, ScalarType::Long, {num_columns});
    that(of_rows.has_value() == of_columns.has_value(), of_rows ? "key_group" : "query_group",
         "expected a tensor, since the other side's groups are given, got none");
  }

 private:
  static bool fits(const Tensor& t, Shape shape) {
    const auto sizes = t.sizes();
    if (sizes.size() != shape.size()) return false;
    const int64_t* size = sizes.data();
    for (const int64_t expected : shape)
      if (const int64_t came = *size++; expected != kAny && came != expected) return false;
    return true;
  }
  template <typename Sizes>
  static std::string shown(const Sizes& sizes) {
    std::ostringstream text;
    const char* separator = "";
    text << '(';
    for (const int64_t size : sizes) {
      text << separator;
      if (size == kAny) text << '*';
      else text << size;
      separator = ", ";
    }
    text << (sizes.size() == 1 ? ",)" : ")");
    return text.str();
  }
  [[noreturn]] void refuse(const char* name, const Tensor& t, const std::string& what, Shape shape) const {
    fail(name, "expected ", what, " of shape ", shown(shape), ", got ", type_name(t.scalar_type()), " of shape ",
         shown(t.sizes()), t.is_contiguous() ? "" : ", not contiguous",
         t.device() == device_ ? "" : ", on another device than the first tensor");
  }
  template <typename... Words>
  [[noreturn]] void fail(const char* name, const Words&... words) const {
    std::ostringstream text;
    text << operator_ << ": " << name << ": ";
    ((text << words), ...);
    STD_TORCH_CHECK(false, text.str());
    __builtin_unreachable();
  }

  const char* operator_;
  torch::stable::Device device_;
};

}  // namespace hicl
