// SPDX-License-Identifier: Apache-2.0
// Shrink: partial sums of the tokens' dot products with all factors.
//
//     partial[part,t,c] = sum over the features f of one part of tokens[t,f] factors[c,f]
#include "product.cuh"

#include "launch.cuh"

namespace lmoe {

// A block computes BLOCK_EXTENT tokens and COLS factors over one part of the features.
template <class S, int COLS>
__global__ void __launch_bounds__(THREADS, RESIDENT<S>) shrink_kernel(ShrinkParams p) {
    DYNAMIC_SMEM(smem);
    using Shrink = Product<S, COLS, true, true>;
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_EXTENT, c0 = static_cast<int64_t>(blockIdx.z) * COLS;
    const int64_t T = p.tokens.rows, C = p.factors.rows;
    const int64_t first = blockIdx.y * p.features_a_part, last = smaller(first + p.features_a_part, p.tokens.columns);
    typename Shrink::Accumulators acc = {};
    Shrink::run(acc, smem, p.tokens, t0, p.factors, c0, first, last);
    float* partial = p.partial + blockIdx.y * T * C + t0 * C + c0;
    Shrink::for_each_accumulator([&](int i, int n, int half, int row, int col) {
        if (t0 + row >= T) return;
        if (c0 + col < C) partial[row * C + col] = acc[i][n][half * 2];
        if (c0 + col + 1 < C) partial[row * C + col + 1] = acc[i][n][half * 2 + 1];
    });
}

void shrink(Dtype dtype, ShrinkParams p, cudaStream_t stream) {
    with_dtype(dtype, [&](auto scalar) {
        with_columns(p.factors.rows, [&](auto columns) {
            using S = decltype(scalar);
            constexpr int COLS = decltype(columns)::value, SMEM = Product<S, COLS, true, true>::SMEM;
            // whole pipeline steps in every part but the last; with few features the last parts may be empty
            p.features_a_part = tiles(tiles(p.tokens.columns, p.parts), BLOCK_K<S>) * static_cast<int64_t>(BLOCK_K<S>);
            const dim3 grid(tiles(p.tokens.rows, BLOCK_EXTENT), static_cast<unsigned>(p.parts), tiles(p.factors.rows, COLS));
            allow_shared_memory(shrink_kernel<S, COLS>, SMEM);
            LAUNCH((shrink_kernel<S, COLS>), grid, dim3(THREADS), SMEM, stream, p);
        });
    });
    check_launch("shrink_kernel");
}

}  // namespace lmoe
