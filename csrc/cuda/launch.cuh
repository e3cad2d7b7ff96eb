// SPDX-License-Identifier: Apache-2.0
// What the launchers share: errors that name the kernel, the current device, grid sizes.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

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

// f(std::integral_constant<int, COLS>) for the columns of a product that cover `columns` in the fewest tiles and, of those,
// with the least waste. 144 are eight experts of rank 16 and their gate.
template <class F>
void with_columns(int64_t columns, F f) {
    if (columns <= 64) return f(std::integral_constant<int, 64>{});
    if (tiles(columns, 128) == tiles(columns, 144)) return f(std::integral_constant<int, 128>{});
    return f(std::integral_constant<int, 144>{});
}

// The stages, on the current device. `shrink` fills in p.features_a_part, `wgrad` p.tokens_a_split.
void shrink(Dtype dtype, ShrinkParams p, cudaStream_t stream);
void mix_fwd(const ForwardParams& p, cudaStream_t stream);
void mix_bwd(const BackwardParams& p, cudaStream_t stream);
void expand(Dtype dtype, const ExpandParams& p, cudaStream_t stream);
void wgrad(Dtype dtype, WgradParams p, cudaStream_t stream);

// All of a forward in one kernel. Throws if p.smem is not what the kernel takes.
void forward_in_one_pass(const ForwardParams& p, cudaStream_t stream);

}  // namespace lmoe
