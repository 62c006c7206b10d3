// What a build with AddressSanitizer (make sanitize) does beyond the others.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define HICL_SANITIZING 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HICL_SANITIZING 1
#endif
#endif

#if defined(HICL_SANITIZING)
extern "C" void* __asan_region_is_poisoned(void* begin, size_t size);
#endif

namespace hicl {

#if defined(HICL_SANITIZING)
constexpr bool kSanitizing = true;

// For code that isn't instrumented, such as a BLAS: reads the first byte that mustn't be touched, if there is one, so that
// the sanitizer reports it as if that code had.
inline void must_be_mine(const void* begin, int64_t bytes) {
  if (bytes <= 0) return;
  const void* bad = __asan_region_is_poisoned(const_cast<void*>(begin), size_t(bytes));
  if (bad) static_cast<void>(*static_cast<const volatile char*>(bad));
}
#else
constexpr bool kSanitizing = false;

inline void must_be_mine(const void*, int64_t) {}
#endif

}  // namespace hicl
