// Launches the forward: shrink with mix, then expand.
#include "forward.cuh"

#include "launch.cuh"

namespace lmoe {

void expand(Dtype dtype, const ExpandParams& p, cudaStream_t stream) {
    const int64_t T = p.coefficients.rows, F = p.factors.columns;
    if (T == 0 || F == 0) return;
    with_dtype(dtype, [&](auto scalar) {
        using S = decltype(scalar);
        const dim3 grid(tiles(T, BLOCK_T), tiles(F, BLOCK_F));
        LAUNCH(expand_kernel<S>, grid, dim3(THREADS), Expand<S>::SMEM, stream, p);
    });
    check_launch("expand_kernel");
}

void forward(const ForwardParams& p, int device, void* queue) {
    if (p.T == 0) return;
    const DeviceGuard guard(device);
    const auto stream = static_cast<cudaStream_t>(queue);
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        static_assert(WideShrink<S>::SMEM <= 48 << 10 && Expand<S>::SMEM <= 48 << 10,
                      "more needs an attribute of the kernel");
        LAUNCH(shrink_fwd_kernel<S>, dim3(tiles(p.T, BLOCK_T)), dim3(THREADS), WideShrink<S>::SMEM, stream, p);
        check_launch("shrink_fwd_kernel");

        ExpandParams e = {};
        e.coefficients = matrix<S>(p.v, false, p.T, p.E * p.R, p.v_stride);
        e.factors = matrix<S>(p.lora_b, p.lora_b_fp32, p.E * p.R, p.O, p.O);
        e.base = p.base;
        e.base_stride = p.base_stride;
        e.out = p.y;
        e.vectors = on_16_bytes(p.y, p.O, sizeof(S)) && on_16_bytes(p.base, p.base_stride, sizeof(S));
        e.scaling = p.scaling;
        expand(p.dtype, e, stream);
    });
}

}  // namespace lmoe
