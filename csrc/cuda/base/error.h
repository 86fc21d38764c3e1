// What the CUDA runtime says when it fails, for whoever calls launchers without its headers.
#pragma once

namespace nowag::cuda {

// What it said when it last failed on this thread, since this was last asked; or "".
const char* take_error();

}  // namespace nowag::cuda
