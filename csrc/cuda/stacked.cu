// SPDX-License-Identifier: Apache-2.0
// Launches the addition of several mixtures to y.
#include "stacked.cuh"

#include "launch.cuh"

namespace lmoe {

void add_stacked(const StackedParams& p, int device, void* queue) {
    if (p.T == 0 || p.tiles == 0) return;
    const DeviceGuard guard(device);
    const auto stream = static_cast<cudaStream_t>(queue);
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        if (stacked_bytes<S>(p) != p.smem) {
            throw std::logic_error("lmoe: stacked_kernel: configs.py and stacked.cuh count shared memory differently");
        }
        if (p.T > DECODE_TOKENS || p.chunks < 1 || DECODE_WARPS % p.chunks != 0 || p.chunks * p.chunk < p.I) {
            throw std::logic_error("lmoe: stacked_kernel: configs.py and stacked.cuh share out the work differently");
        }
        const auto kernel = stacked_kernel<S>;
        const int smem = static_cast<int>(p.smem);
        allow_shared_memory(kernel, smem);
        check("stacked_kernel", launch_cooperative(kernel, dim3(p.blocks), dim3(DECODE_THREADS), smem, stream, p));
    });
}

}  // namespace lmoe
