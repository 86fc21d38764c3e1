// What a function of the public interface answers where its body threw.
#pragma once

#include "nowag/status.h"

namespace nowag::cpu {

// The status of the exception that is being handled: every entry point that allocates or polls ends
// in  catch (...) { return failure(); }
Status failure();

}  // namespace nowag::cpu
