// What the compiler's headers take from glibc and libstdc++ that older ones don't have; tools/old_systems.py links it in.
#include <new>
#include <sstream>

// Since glibc 2.32: whether a process has one thread only. "No" is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

// Since GCC 11.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// Since GCC 9: their constructors without arguments, which were inline before.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

}  // namespace std
