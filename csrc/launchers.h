// The launchers, as the bindings see them. Each queues its kernels on `stream` of `device`, allocates nothing, waits for
// nothing, and throws where CUDA refuses a launch; the error names the kernel.
#pragma once

#include "params.h"

namespace lmoe {

void forward(const ForwardParams& params, int device, void* stream);
void backward(const BackwardParams& params, int device, void* stream);
void decode(const DecodeParams& params, int device, void* stream);

// Multiprocessors of a device. Throws where the device cannot run the kernels: a driver too old, an architecture left out.
int processors(int device);

}  // namespace lmoe
