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
    using Shrink = Product<S, COLS, true, true, CopiesOfTwo>;
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_EXTENT, c0 = static_cast<int64_t>(blockIdx.z) * COLS;
    const int64_t T = p.tokens.rows, C = p.factors.rows;
    const int64_t first = blockIdx.y * p.features_a_part, last = smaller(first + p.features_a_part, p.tokens.columns);
    typename Shrink::Accumulators acc = {};
    Shrink::run(acc, smem, p.tokens, t0, p.factors, c0, first, last);
    const int rows = static_cast<int>(smaller(T - t0, BLOCK_EXTENT)), columns = static_cast<int>(smaller(C - c0, COLS));
    float* partial = p.partial + (blockIdx.y * T + t0) * C + c0;
#pragma unroll
    for (int i = 0; i < Shrink::WARP_ROWS / 8; ++i) {
        const int row = Shrink::row_of_lane() + i * 8;
        float* out = partial + row * C + Shrink::column_of_lane();
#pragma unroll
        for (int n = 0; n < Shrink::WARP_COLS / 8; ++n) {
            const int left = columns - Shrink::column_of_lane() - n * 8;
            const Pair<float> sums = {acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]};
            if (row >= rows || left <= 0) continue;
            if (C % 2 == 0) {
                store_pair(out + n * 8, sums);
            } else {
                out[n * 8] = sums.first;
                if (left > 1) out[n * 8 + 1] = sums.second;
            }
        }
    }
}

void shrink(Dtype dtype, ShrinkParams p, cudaStream_t stream) {
    with_dtype(dtype, [&](auto scalar) {
        with_columns(p.factors.rows, [&](auto columns) {
            using S = decltype(scalar);
            constexpr int COLS = decltype(columns)::value, SMEM = Product<S, COLS, true, true, CopiesOfTwo>::SMEM;
            // whole pipeline steps in every part but the last; with few features the last parts may be empty
            p.features_a_part = tiles(tiles(p.tokens.columns, p.parts), BLOCK_K<S>) * static_cast<int64_t>(BLOCK_K<S>);
            const dim3 grid(tiles(p.tokens.rows, BLOCK_EXTENT), static_cast<unsigned>(p.parts), tiles(p.factors.rows, COLS));
            LAUNCH((shrink_kernel<S, COLS>), grid, dim3(THREADS), SMEM, stream, p);
        });
    });
    check_launch("shrink_kernel");
}

}  // namespace lmoe
