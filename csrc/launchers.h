// SPDX-License-Identifier: Apache-2.0
// The launchers, as the bindings call them. Each queues its kernels on `stream` of `device`, allocates nothing and does not
// wait. It throws if CUDA refuses a launch, with an error that names the kernel.
#pragma once

#include "params.h"

namespace lmoe {

void forward(const ForwardParams& params, int device, void* stream);
void backward(const BackwardParams& params, int device, void* stream);
void decode(const DecodeParams& params, int device, void* stream);
void add_stacked(const StackedParams& params, int device, void* stream);
void dropout(const DropoutParams& params, int device, void* stream);

// What a device offers the kernels; memory in bytes.
struct Properties {
    int processors;
    int shared_memory_a_block;  // at most, if a kernel asks for it
    int cooperative;            // all blocks of a launch can wait for one another: not 0
};

// Throws if the device cannot run the kernels: the driver is too old, or the extension was not compiled for this
// architecture.
Properties properties(int device);

}  // namespace lmoe
