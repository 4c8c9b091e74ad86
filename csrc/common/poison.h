#pragma once

namespace ck {

// CONVKERNELS_POISON=1: memory is filled with NaN when it is allocated, so that tests see what is read or left
// unwritten.
bool poisoned();

}  // namespace ck
