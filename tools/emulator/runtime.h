// The parts of the CUDA runtime that the launchers use: two devices, attributes of kernels, launches. Every launch is
// recorded with its device and stream, and calls for attributes are counted. Calls that CUDA refuses fail here, too. There
// is no function that waits for the device, so a launcher that calls one does not compile.
#pragma once

#include <map>
#include <set>
#include <utility>

#include "machine.h"

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emu {

constexpr int DEVICES = 2, SHARED_BYTES = 48 << 10;  // of shared memory that a kernel may take by default

struct Device {                    // as on sm_80, unless a test changes it
    int shared_bytes = 163 << 10;  // that a block may take if its kernel's attribute is set
    bool cooperative = true;
    bool sets_attributes = true;
};

struct Launch {
    const char* kernel;  // as in the launcher's source; null for a cooperative launch
    cudaStream_t stream;
    uint64_t shared_bytes, blocks;
    int device;
};
inline std::vector<Launch> launches;
inline Device devices[DEVICES];
inline int current_device = 0;
inline int attribute_calls = 0;
inline bool capturing = false;                                       // a stream captures a graph
inline bool capture_is_relaxed = false;                              // in this thread
inline std::set<std::pair<int, const void*>> loaded;                 // kernels, on a device
inline std::map<std::pair<int, const void*>, size_t> allowed_bytes;  // of shared memory, of a kernel on a device

inline int processors_of(int device) { return options.processors + device; }

inline cudaError_t refuse(const char* reason) {
    last_error = reason;
    error_is_reported = false;
    return 1;
}

// Machine code is loaded when CUDA first needs it.
inline cudaError_t load(const void* kernel) {
    if (loaded.count({current_device, kernel}) > 0) return cudaSuccess;
    if (capturing && !capture_is_relaxed) return refuse("operation not permitted when stream is capturing");
    loaded.insert({current_device, kernel});
    return cudaSuccess;
}

inline bool allows(const void* kernel, size_t shared_bytes) {
    const auto allowed = allowed_bytes.find({current_device, kernel});
    const size_t most = allowed == allowed_bytes.end() ? size_t{SHARED_BYTES} : allowed->second;
    return shared_bytes <= most && shared_bytes <= static_cast<size_t>(devices[current_device].shared_bytes);
}

template <class Params>
cudaError_t start(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                  bool together, Params params) {
    if (!options.running) return cudaSuccess;
    if (load(reinterpret_cast<const void*>(kernel)) != cudaSuccess) return 1;
    if (!allows(reinterpret_cast<const void*>(kernel), shared_bytes)) {
        return refuse("invalid argument: shared memory beyond what the kernel may take on this device");
    }
    if (together && !devices[current_device].cooperative) return refuse("operation not supported: cooperative launch");
    if (together && grid.x > static_cast<unsigned>(processors_of(current_device))) {
        return refuse("too many blocks in cooperative launch");
    }
    launches.push_back({name, stream, shared_bytes, uint64_t{grid.x} * grid.y * grid.z, current_device});
    launch(grid, block, shared_bytes, together, [=] { kernel(params); });
    return error_is_reported ? cudaSuccess : 1;
}

}  // namespace emu

#define START(kernel, grid, block, smem, stream, params) \
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

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrCooperativeLaunch
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    ++emu::attribute_calls;
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = emu::processors_of(device); break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emu::devices[device].shared_bytes; break;
        case cudaDevAttrCooperativeLaunch: *value = emu::devices[device].cooperative; break;
    }
    return cudaSuccess;
}

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
    ++emu::attribute_calls;
    return emu::load(kernel);
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    ++emu::attribute_calls;
    const emu::Device& device = emu::devices[emu::current_device];
    if (emu::load(kernel) != cudaSuccess) return 1;
    if (!device.sets_attributes) return emu::refuse("operation not supported: an attribute of a kernel");
    if (bytes > device.shared_bytes) return emu::refuse("invalid argument: more shared memory than the device has");
    emu::allowed_bytes[{emu::current_device, kernel}] = bytes;
    return cudaSuccess;
}

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    const bool relaxed = *mode == cudaStreamCaptureModeRelaxed;
    *mode = emu::capture_is_relaxed ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
    emu::capture_is_relaxed = relaxed;
    return cudaSuccess;
}
