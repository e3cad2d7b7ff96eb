// Launches the forward of few tokens.
#include "decode.cuh"

#include <atomic>

#include "launch.cuh"

namespace lmoe {

void decode(DecodeParams p, int device, void* queue) {
    static std::atomic<unsigned> launches{0};
    if (p.T == 0 || p.O == 0) return;
    const DeviceGuard guard(device);
    p.barrier = static_cast<int>(launches.fetch_add(1, std::memory_order_relaxed) % BARRIERS);
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        if (DecodeLayout::of(p, sizeof(S)).bytes != p.smem) {
            throw std::logic_error("lmoe: decode_fwd_kernel: configs.py and decode.cuh count shared memory differently");
        }
        const int smem = static_cast<int>(p.smem);
        allow_shared_memory(decode_fwd_kernel<S>, smem);
        check("decode_fwd_kernel", launch_cooperative(decode_fwd_kernel<S>, dim3(p.blocks), dim3(DECODE_THREADS), smem,
                                                      static_cast<cudaStream_t>(queue), p));
    });
}

int processors(int device) {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check("kernels", cudaFuncGetAttributes(&attributes, decode_fwd_kernel<float>));
    int count = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

}  // namespace lmoe
