// SPDX-License-Identifier: Apache-2.0
// Launches the forward of few tokens.
#include "decode.cuh"

#include "launch.cuh"

namespace lmoe {

const void* decode_kernel() { return reinterpret_cast<const void*>(decode_fwd_kernel<float>); }

void decode(const DecodeParams& p, int device, void* queue) {
    if (p.T == 0 || p.O == 0) return;
    const DeviceGuard guard(device);
    const auto stream = static_cast<cudaStream_t>(queue);
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        if (DecodeLayout::of(p, sizeof(S)).bytes != p.smem) {
            throw std::logic_error("lmoe: decode_fwd_kernel: configs.py and decode.cuh count shared memory differently");
        }
        if (p.T > DECODE_TOKENS || p.chunks < 1 || DECODE_WARPS % p.chunks != 0 || p.chunks * p.chunk < p.I) {
            throw std::logic_error("lmoe: decode_fwd_kernel: configs.py and decode.cuh share out the work differently");
        }
        const auto kernel = decode_fwd_kernel<S>;
        const int smem = static_cast<int>(p.smem);
        allow_shared_memory(kernel, smem);
        check("decode_fwd_kernel", launch_cooperative(kernel, dim3(p.blocks), dim3(DECODE_THREADS), smem, stream, p));
    });
}

}  // namespace lmoe
