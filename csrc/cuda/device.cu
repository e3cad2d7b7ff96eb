// SPDX-License-Identifier: Apache-2.0
// What the launchers ask of CUDA before the first launch of a kernel: its machine code, its shared memory, the device's
// properties.
#include <map>
#include <mutex>
#include <utility>

#include "launch.cuh"

namespace lmoe {
namespace {

// For its lifetime this thread may load machine code although a stream captures a graph, the first call of a process
// included. Loading is not part of the graph, and drivers before CUDA 12.3 refuse it in a capture.
class RelaxedCapture {
public:
    RelaxedCapture() { check("cudaThreadExchangeStreamCaptureMode", cudaThreadExchangeStreamCaptureMode(&mode_)); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void allow_shared_memory(const void* kernel, int bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int> allowed;  // of a kernel on a device
    int device = 0;
    check("cudaGetDevice", cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(mutex);
    auto found = allowed.find({kernel, device});
    if (found == allowed.end()) {
        const RelaxedCapture relaxed;
        cudaFuncAttributes attributes;  // CUDA looks for the device's machine code of the kernel, and fails if there is none
        check("kernels", cudaFuncGetAttributes(&attributes, kernel));
        found = allowed.insert({{kernel, device}, DEFAULT_SHARED_MEMORY}).first;
    }
    if (bytes <= found->second) return;
    check("cudaFuncSetAttribute", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    found->second = bytes;
}

Properties properties(int device) {
    const DeviceGuard guard(device);
    allow_shared_memory(decode_kernel(), 0);
    Properties p = {};
    auto ask = [device](cudaDeviceAttr attribute, int& value) {
        check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, device));
    };
    ask(cudaDevAttrMultiProcessorCount, p.processors);
    ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, p.shared_memory_a_block);
    ask(cudaDevAttrCooperativeLaunch, p.cooperative);
    try {
        allow_shared_memory(decode_kernel(), p.shared_memory_a_block);
    } catch (const std::runtime_error&) {  // a driver that refuses what its device has: plan with what needs no permission
        p.shared_memory_a_block = DEFAULT_SHARED_MEMORY;
    }
    return p;
}

}  // namespace lmoe
