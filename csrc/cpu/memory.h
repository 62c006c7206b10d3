// Large blocks of memory, in pages large enough that touching them for the first time costs next to nothing.
#pragma once
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hicl {

// Asks for huge pages where the system leaves that to programs. A hint: nothing depends on it.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Not a vector: nothing is set to zero.
template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t count) {
  std::unique_ptr<T[]> data(new T[count]);
  prefer_huge_pages(data.get(), count * int64_t(sizeof(T)));
  return data;
}

}  // namespace hicl
