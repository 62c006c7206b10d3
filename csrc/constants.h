// The numbers and codes that csrc shares with hicl_fast/ops/common/constants.py; tests/csrc/test_constants.py compares them.
#pragma once
#include <cstdint>

namespace hicl {

constexpr double kNormFloor = 1e-12;     // x̂ = x / max(‖x‖, kNormFloor)
constexpr double kAngleClamp = 1e-7;     // θ = arccos(clamp(s, −1 + kAngleClamp, 1 − kAngleClamp))
constexpr double kPowerFloor = 1e-4;     // of similarities under a power
constexpr int kVanishingRoundings = 16;  // a mixture's ‖g‖² below that many of its terms' has no digit that is right

// What a row's special column of a kind is.
enum class Special : int64_t {
  kNothing = 0,      // no column is anyone's
  kPositive = 1,     // the target: left out of the softmax's sum, and accounted for by itself
  kOwnNegative = 2,  // the explicit negative that belongs to the row: its logit gets a bias
};

// What the columns of a row's own group are to the row.
enum class Groups : int64_t {
  kOrdinary = 0,   // negatives like all others
  kExcluded = 1,   // left out
  kPositives = 2,  // further positives, beside the target
};

}  // namespace hicl
