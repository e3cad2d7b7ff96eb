// What the launchers share: errors that name the kernel, the tensors' device, tiles counted.
#pragma once

#include <stdexcept>
#include <string>

#include "launchers.h"
#include "ptx.h"

namespace lmoe {

inline void check(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it is told here: the next launch's check must not find it again
    throw std::runtime_error(std::string("lmoe: CUDA ") + what + ": " + cudaGetErrorString(error));
}

// A launch that the driver refuses is told at once; a kernel that fails later is told by a later call, as always in CUDA.
inline void check_launch(const char* kernel) { check(kernel, cudaGetLastError()); }

// Shared memory beyond the 48 KB that every kernel may take.
template <class Params>
void allow_shared_memory(void (*kernel)(Params), int bytes) {
    if (bytes <= 48 << 10) return;
    check("cudaFuncSetAttribute", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// The current device is `device` as long as this lives.
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

// f(S{}) for the type that a dtype names.
template <class F>
void with_dtype(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::fp32: return f(float{});
        case Dtype::bf16: return f(__nv_bfloat16{});
        case Dtype::fp16: return f(__half{});
    }
    throw std::invalid_argument("lmoe: dtype must be one of fp32, bf16, fp16");
}

// The shrink in p.parts parts of forward, and of backward into dv; p.features_a_part is filled in. On the current device.
void shrink_in_parts(Dtype dtype, ShrinkParams p, cudaStream_t stream);

// The expand of forward, and of backward into dx; on the current device.
void expand(Dtype dtype, const ExpandParams& p, cudaStream_t stream);

}  // namespace lmoe
