// SPDX-License-Identifier: Apache-2.0
// What the launchers share: errors that name the kernel, the current device, grid sizes.
#pragma once

#include <stdexcept>
#include <string>

#include "launchers.h"
#include "ptx.h"

namespace lmoe {

inline void check(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clear the sticky error: it is reported here and must not be reported again by the next check
    throw std::runtime_error(std::string("lmoe: CUDA ") + what + ": " + cudaGetErrorString(error));
}

// Reports a launch that the driver refuses. An error while the kernel runs shows in a later call, as always in CUDA.
inline void check_launch(const char* kernel) { check(kernel, cudaGetLastError()); }

constexpr int DEFAULT_SHARED_MEMORY = 48 << 10;  // dynamic shared memory in bytes that CUDA allows every kernel

// Loads a kernel's machine code on the current device, and allows it `bytes` of dynamic shared memory. Both are done once;
// later calls do not call CUDA's functions for kernels unless the kernel needs more than before.
void allow_shared_memory(const void* kernel, int bytes);

template <class Params>
void allow_shared_memory(void (*kernel)(Params), int bytes) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

#define LAUNCH(kernel, grid, block, smem, stream, params) \
    (allow_shared_memory(kernel, smem), START(kernel, grid, block, smem, stream, params))

// The decode kernel in fp32, for questions to CUDA about a device: all kernels are compiled for the same architectures.
const void* decode_kernel();

// Makes `device` the current device for the lifetime of this object.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check("cudaGetDevice", cudaGetDevice(&before_));
        if (before_ != device) check("cudaSetDevice", cudaSetDevice(device));
        changed_ = before_ != device;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

inline unsigned tiles(int64_t extent, int64_t block) { return static_cast<unsigned>((extent + block - 1) / block); }

// f(S{}) for the element type S of a dtype.
template <class F>
void with_dtype(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::fp32: return f(float{});
        case Dtype::bf16: return f(__nv_bfloat16{});
        case Dtype::fp16: return f(__half{});
    }
    throw std::invalid_argument("lmoe: dtype must be one of fp32, bf16, fp16");
}

// A split shrink on the current device, of x in the forward and of dy in the backward; it fills in p.features_a_part.
void shrink_in_parts(Dtype dtype, ShrinkParams p, cudaStream_t stream);

// Expand on the current device, into y in the forward and into dx in the backward.
void expand(Dtype dtype, const ExpandParams& p, cudaStream_t stream);

}  // namespace lmoe
