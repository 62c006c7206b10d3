// From run-time element types to templates.
#pragma once
#include "platform.cuh"
#include "types.h"

namespace hicl::cuda {

template <typename T>
struct Tag {
  using Type = T;
};

template <typename F>
int for_type(ElementType type, F f) {
  switch (type) {
    case ElementType::kBFloat16: return f(Tag<__nv_bfloat16>{});
    case ElementType::kFloat16: return f(Tag<__half>{});
    default: return f(Tag<float>{});
  }
}

}  // namespace hicl::cuda
