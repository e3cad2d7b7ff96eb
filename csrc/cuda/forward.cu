// Launches the forward: in one pass, or shrink with mix, then expand, or shrink in parts, then mix, then expand.
#include "forward.cuh"

#include "launch.cuh"

namespace lmoe {

void shrink_in_parts(Dtype dtype, ShrinkParams p, cudaStream_t stream) {
    with_dtype(dtype, [&](auto scalar) {
        using S = decltype(scalar);
        // whole steps of the sum in every part but the last; of few features the last ones may be empty
        p.features_a_part = tiles(tiles(p.rows.columns, p.parts), BLOCK_K<S>) * static_cast<int64_t>(BLOCK_K<S>);
        const dim3 grid(tiles(p.rows.rows, BLOCK_T), static_cast<unsigned>(p.parts));
        const int smem = shrink_smem<S>(p.factors.rows);
        allow_shared_memory(shrink_kernel<S>, smem);
        LAUNCH(shrink_kernel<S>, grid, dim3(THREADS), smem, stream, p);
    });
    check_launch("shrink_kernel");
}

void expand(Dtype dtype, const ExpandParams& p, cudaStream_t stream) {
    if (p.output.T == 0 || p.output.F == 0) return;
    with_dtype(dtype, [&](auto scalar) {
        using S = decltype(scalar);
        static_assert(Expand<S>::SMEM <= 48 << 10, "more needs an attribute of the kernel");
        const dim3 grid(tiles(p.output.T, BLOCK_T), tiles(p.output.F, BLOCK_F));
        LAUNCH(expand_kernel<S>, grid, dim3(THREADS), Expand<S>::SMEM, stream, p);
    });
    check_launch("expand_kernel");
}

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
    const Matrix v = matrix<S>(p.v, false, p.T, p.E * p.R, p.v_stride);
    expand(p.dtype, {v, b_of<S>(p), output<S>(p.y, p.base, p.base_stride, p.T, p.O, p.scaling)}, stream);
}

}  // namespace

void forward(const ForwardParams& p, int device, void* queue) {
    if (p.T == 0) return;
    const DeviceGuard guard(device);
    const auto stream = static_cast<cudaStream_t>(queue);
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        p.smem > 0 ? forward_in_one_pass<S>(p, stream) : forward_by_stages<S>(p, stream);
    });
}

}  // namespace lmoe
