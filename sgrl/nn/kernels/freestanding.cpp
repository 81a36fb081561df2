// What slot_neurons.cpp needs of the C++ library: memory for its short lists. Prebuilt libraries
// have it from here and so run with any version of that library (those compiled on the spot do not
// need it). Errors end the process, as an exception would that came out of extern "C".

#include <cstddef>
#include <cstdlib>

void* operator new(std::size_t size) {
  if (void* memory = std::malloc(size)) return memory;
  std::abort();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace std {
[[noreturn]] void __throw_length_error(const char*) { abort(); }
[[noreturn]] void __throw_bad_alloc() { abort(); }
[[noreturn]] void __throw_bad_array_new_length() { abort(); }
}  // namespace std
