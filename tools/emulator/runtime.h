// The parts of the CUDA runtime that the launchers use: two devices, attributes of kernels, launches. Every launch is
// recorded with its device and stream. Calls that CUDA refuses fail here, too.
#pragma once

#include <map>
#include <utility>

#include "machine.h"

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emu {

constexpr int DEVICES = 2, SHARED_BYTES = 48 << 10, MOST_SHARED_BYTES = 163 << 10;  // by default, and at most: sm_80

struct Launch {
    const char* kernel;  // as in the launcher's source; null for a cooperative launch
    cudaStream_t stream;
    uint64_t shared_bytes;
    int device;
};
inline std::vector<Launch> launches;
inline int current_device = 0;
inline std::map<std::pair<int, const void*>, size_t> allowed_bytes;  // of shared memory, of a kernel on a device

inline int processors_of(int device) { return options.processors + device; }

inline cudaError_t refuse(const char* reason) {
    last_error = reason;
    error_is_reported = false;
    return 1;
}

template <class Params>
cudaError_t start(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                  bool together, Params params) {
    if (!options.running) return cudaSuccess;
    const auto allowed = allowed_bytes.find({current_device, reinterpret_cast<const void*>(kernel)});
    if (shared_bytes > (allowed == allowed_bytes.end() ? size_t{SHARED_BYTES} : allowed->second)) {
        return refuse("invalid argument: shared memory beyond what the kernel may take on this device");
    }
    if (together && grid.x > static_cast<unsigned>(processors_of(current_device))) {
        return refuse("too many blocks in cooperative launch");
    }
    launches.push_back({name, stream, shared_bytes, current_device});
    launch(grid, block, shared_bytes, together, [=] { kernel(params); });
    return error_is_reported ? cudaSuccess : 1;
}

}  // namespace emu

#define LAUNCH(kernel, grid, block, smem, stream, params) \
    ((void)emu::start(#kernel, kernel, grid, block, smem, stream, false, params))

template <class Params>
cudaError_t launch_cooperative(void (*kernel)(Params), dim3 grid, dim3 block, int smem, cudaStream_t stream, Params params) {
    return emu::start(nullptr, kernel, grid, block, smem, stream, true, params);
}

inline cudaError_t cudaGetLastError() { return std::exchange(emu::error_is_reported, true) ? cudaSuccess : 1; }
inline const char* cudaGetErrorString(cudaError_t) { return emu::last_error.c_str(); }

inline cudaError_t cudaGetDevice(int* device) {
    *device = emu::current_device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emu::DEVICES) return emu::refuse("invalid device ordinal");
    emu::current_device = device;
    return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    *value = emu::processors_of(device);
    return cudaSuccess;
}

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute, int bytes) {
    if (bytes > emu::MOST_SHARED_BYTES) return emu::refuse("invalid argument: more shared memory than the device has");
    emu::allowed_bytes[{emu::current_device, reinterpret_cast<const void*>(kernel)}] = bytes;
    return cudaSuccess;
}
