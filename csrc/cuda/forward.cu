// SPDX-License-Identifier: Apache-2.0
// Launches the forward: one pass; or shrink with mix, then expand; or a split shrink, then mix, then expand.
#include "forward.cuh"

#include "launch.cuh"

namespace lmoe {
namespace {

template <class S>
void forward_in_one_pass(const ForwardParams& p, cudaStream_t stream) {
    if (ForwardLayout<S>::of(p.E, p.R).bytes != p.smem) {
        throw std::logic_error("lmoe: forward_kernel: configs.py and forward.cuh count shared memory differently");
    }
    const int smem = static_cast<int>(p.smem);
    allow_shared_memory(forward_kernel<S>, smem);
    LAUNCH(forward_kernel<S>, dim3(tiles(p.T, BLOCK_T)), dim3(THREADS), smem, stream, p);
    check_launch("forward_kernel");
}

template <class S>
void forward_by_stages(const ForwardParams& p, cudaStream_t stream) {
    const Matrix factors = a_and_gate<S>(p);
    if (p.shrink_parts > 1) {
        shrink_in_parts(p.dtype, {tokens_of<S>(p), factors, p.partial, p.shrink_parts, 0}, stream);
        LAUNCH(mix_fwd_kernel<S>, dim3(tiles(p.T, MIX_T)), dim3(THREADS), 0, stream, p);
        check_launch("mix_fwd_kernel");
    } else {
        const int smem = shrink_smem<S>(factors.rows);
        allow_shared_memory(shrink_fwd_kernel<S>, smem);
        LAUNCH(shrink_fwd_kernel<S>, dim3(tiles(p.T, BLOCK_T)), dim3(THREADS), smem, stream, p);
        check_launch("shrink_fwd_kernel");
    }
    const Matrix v = matrix<S>(p.v.data, false, p.T, p.E * p.R, p.v.stride);
    expand(p.dtype, {v, b_of<S>(p), output<S>(p.y, p.base.data, p.base.stride, p.T, p.O, p.scaling)}, stream);
}

}  // namespace

void forward(const ForwardParams& p, int device, void* queue) {
    if (p.T == 0) return;
    const DeviceGuard guard(device);
    const auto stream = static_cast<cudaStream_t>(queue);
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        switch (p.path) {
            case Path::one_pass: return forward_in_one_pass<S>(p, stream);
            case Path::stages: return forward_by_stages<S>(p, stream);
        }
    });
}

}  // namespace lmoe
