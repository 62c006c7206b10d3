#include "dispatch.cuh"
#include "rows.cuh"

namespace hicl::cuda {
namespace {

constexpr size_t kScratchBytes = kRowThreads / kWarp * sizeof(float);  // block_sum's

// Calls f with the stretches that rows of this shape are cut into.
template <typename F>
int for_rows(const RowShape& shape, F f) {
  return for_type(shape.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (shape.dim <= kHeld * kWarp)
      return shape.is_aligned ? f(Tag<Stretch<T, true, kWarp>>{}) : f(Tag<Stretch<T, false, kWarp>>{});
    return shape.is_aligned ? f(Tag<Stretch<T, true, kRowThreads>>{}) : f(Tag<Stretch<T, false, kRowThreads>>{});
  });
}

template <typename Part, typename... Parameters, typename... Arguments>
int launch_rows(void (*kernel)(RowShape, Parameters...), const RowShape& shape, void* stream,
                const Arguments&... arguments) {
  if (shape.num_rows == 0) return 0;
  const int64_t blocks = (shape.num_rows + Part::kRowsPerBlock - 1) / Part::kRowsPerBlock;
  return launch(kernel, blocks, kRowThreads, kScratchBytes, stream, shape, arguments...);
}

}  // namespace

int launch_normalise(const RowShape& shape, const NormaliseBuffers& buffers, void* stream) {
  return for_rows(shape, [&](auto tag) {
    using Part = typename decltype(tag)::Type;
    return launch_rows<Part>(normalise_kernel<Part>, shape, stream, buffers);
  });
}

int launch_scale_rows(const RowShape& shape, const void* x, const float* factor, void* scaled, void* stream) {
  return for_rows(shape, [&](auto tag) {
    using Part = typename decltype(tag)::Type;
    using T = typename Part::Type;
    return launch_rows<Part>(scale_rows_kernel<Part>, shape, stream, static_cast<const T*>(x), factor,
                             static_cast<T*>(scaled));
  });
}

int launch_positive(const RowShape& shape, const PositiveBuffers& buffers, void* stream) {
  return for_rows(shape, [&](auto tag) {
    using Part = typename decltype(tag)::Type;
    return launch_rows<Part>(positive_kernel<Part>, shape, stream, buffers);
  });
}

int launch_norm_gradient(const RowShape& shape, const NormGradientBuffers& buffers, void* stream) {
  return for_rows(shape, [&](auto tag) {
    using Part = typename decltype(tag)::Type;
    return launch_rows<Part>(norm_gradient_kernel<Part>, shape, stream, buffers);
  });
}

}  // namespace hicl::cuda
