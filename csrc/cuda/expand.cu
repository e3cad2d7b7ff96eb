// SPDX-License-Identifier: Apache-2.0
// Expand: out[t,f] = base + scaling * sum_c coefficients[t,c] factors[c,f]
#include "expand.cuh"

#include "launch.cuh"

namespace lmoe {

// A block computes BLOCK_EXTENT tokens and BLOCK_F features. Blocks in sequence share their tokens' coefficients, and write
// whole rows together.
template <class S>
__global__ void __launch_bounds__(THREADS, RESIDENT<S>) expand_kernel(ExpandParams p) {
    DYNAMIC_SMEM(smem);
    const unsigned tiles = Expand<S>::tiles_over(p.output.F);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x / tiles) * BLOCK_EXTENT;
    const int64_t f0 = static_cast<int64_t>(blockIdx.x % tiles) * BLOCK_F;
    typename Expand<S>::Accumulators acc = {};
    Expand<S>::run(acc, smem, p.coefficients, t0, p.factors, f0, 0, p.factors.rows);
    store_tile<S>(p.output, acc, t0, f0);
}

void expand(Dtype dtype, const ExpandParams& p, cudaStream_t stream) {
    if (p.output.T == 0 || p.output.F == 0) return;
    with_dtype(dtype, [&](auto scalar) {
        using S = decltype(scalar);
        const dim3 grid(tiles(p.output.T, BLOCK_EXTENT) * tiles(p.output.F, BLOCK_F));
        allow_shared_memory(expand_kernel<S>, Expand<S>::SMEM);
        LAUNCH(expand_kernel<S>, grid, dim3(THREADS), Expand<S>::SMEM, stream, p);
    });
    check_launch("expand_kernel");
}

}  // namespace lmoe
