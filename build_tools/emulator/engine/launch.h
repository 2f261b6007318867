// Running a kernel's CTAs.
#pragma once
#include <string>

#include "cta.h"

namespace gnaforge::emulator {

/// Most shared memory of one CTA, static and dynamic together, on sm_90 and sm_100.
constexpr uint32_t kMaxShared = 232448;

/// Runs all CTAs on `threads` host threads and adds up what they counted. Throws EmulationError.
void run_launch(const Launch& launch, uint32_t threads, Counters& counters);

}  // namespace gnaforge::emulator
