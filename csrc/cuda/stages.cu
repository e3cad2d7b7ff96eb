// SPDX-License-Identifier: Apache-2.0
// The stages that forward and backward launch as kernels of their own: a split shrink, and expand.
#include "stages.cuh"

#include "launch.cuh"

namespace lmoe {

// A block computes partial sums: BLOCK_T tokens over one part of their features.
template <class S>
__global__ void __launch_bounds__(THREADS) shrink_kernel(ShrinkParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T, C = p.factors.rows;
    const int64_t first = blockIdx.y * p.features_a_part, last = smaller(first + p.features_a_part, p.tokens.columns);
    float* partial = p.partial + blockIdx.y * p.tokens.rows * C;
    shrink<S>(smem, p.tokens, t0, p.factors, first, last,
              [&](int64_t t, int64_t column, float value) { partial[t * C + column] = value; });
}

// out[t,f] = base + scaling * sum_c coefficients[t,c] factors[c,f]
template <class S>
__global__ void __launch_bounds__(THREADS) expand_kernel(ExpandParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T, f0 = static_cast<int64_t>(blockIdx.y) * BLOCK_F;
    store_tile<S>(p.output, Expand<S>::run(smem, p.coefficients, t0, p.factors, f0, 0, p.factors.rows), t0, f0);
}

void shrink_in_parts(Dtype dtype, ShrinkParams p, cudaStream_t stream) {
    with_dtype(dtype, [&](auto scalar) {
        using S = decltype(scalar);
        // whole pipeline steps in every part but the last; with few features the last parts may be empty
        p.features_a_part = tiles(tiles(p.tokens.columns, p.parts), BLOCK_K<S>) * static_cast<int64_t>(BLOCK_K<S>);
        const dim3 grid(tiles(p.tokens.rows, BLOCK_T), static_cast<unsigned>(p.parts));
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
        static_assert(Expand<S>::SMEM <= 48 << 10, "more than 48 KB must be allowed for each kernel");
        const dim3 grid(tiles(p.output.T, BLOCK_T), tiles(p.output.F, BLOCK_F));
        LAUNCH(expand_kernel<S>, grid, dim3(THREADS), Expand<S>::SMEM, stream, p);
    });
    check_launch("expand_kernel");
}

}  // namespace lmoe
