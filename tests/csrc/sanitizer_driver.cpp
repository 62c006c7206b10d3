// What a build with a sanitizer must find: writes beyond a part of a workspace, and operands of a product that would be.
#include <cstring>

#include "memory.h"

int main(int, char** arguments) {
  hicl::Workspace workspace(hicl::Workspace::bytes_of<float>(10) + hicl::Workspace::bytes_of<float>(10));
  float* first = workspace.take<float>(10);
  float* second = workspace.take<float>(10);
  const int count = arguments[2][0] == '1' ? 11 : 10;
  if (!std::strcmp(arguments[1], "write")) {
    for (int i = 0; i < count; ++i) first[i] = second[i] = 1;
  } else if (!std::strcmp(arguments[1], "operand")) {
    hicl::must_be_mine(first, count * sizeof(float));
  } else {
    try {
      workspace.take<float>(1);
    } catch (const std::logic_error&) {
      return 3;
    }
  }
  return 0;
}
