// What this build can tell of itself: instruction sets, and its copies of the constants.
#include <torch/csrc/stable/library.h>

#include <iomanip>
#include <sstream>
#include <string>

#include "../constants.h"
#include "rows.h"

namespace hicl {
namespace {

std::string capability() { return cpu_capability(); }
std::string capabilities() { return cpu_capabilities(); }

// A line each: the name in hicl_fast/ops/common/constants.py and the value here.
std::string constants() {
  std::ostringstream text;
  text << std::setprecision(17);
  text << "NORM_FLOOR " << kNormFloor << "\nANGLE_CLAMP " << kAngleClamp << "\nPOWER_FLOOR " << kPowerFloor
       << "\nVANISHING " << kVanishingRoundings;
  text << "\nSpecial.NOTHING " << int(Special::kNothing) << "\nSpecial.POSITIVE " << int(Special::kPositive)
       << "\nSpecial.OWN_NEGATIVE " << int(Special::kOwnNegative);
  text << "\nGroups.ORDINARY " << int(Groups::kOrdinary) << "\nGroups.EXCLUDED " << int(Groups::kExcluded)
       << "\nGroups.POSITIVES " << int(Groups::kPositives);
  return text.str();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hicl_fast_cpp, m) {
  m.def("capability() -> str");
  m.def("capabilities() -> str");
  m.def("constants() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(hicl_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("capabilities", TORCH_BOX(&capabilities));
  m.impl("constants", TORCH_BOX(&constants));
}

}  // namespace hicl
