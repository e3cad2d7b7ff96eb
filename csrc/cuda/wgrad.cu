// SPDX-License-Identifier: Apache-2.0
// Wgrad: the gradients of factors, sums over the tokens.
//
//     gradient[c,f] = scaling * sum_t coefficients[t,c] tokens[t,f]
#include "product.cuh"

#include "launch.cuh"

namespace lmoe {

// The row of one coefficient's gradient.
__device__ __forceinline__ Tensor gradient_of(const WgradParams& p, int64_t c, int size) {
    const bool first = c < p.split, fp32 = first ? p.first_fp32 : p.second_fp32;
    const int64_t offset = (first ? c : c - p.split) * p.tokens.columns * (fp32 ? 4 : size);
    return {static_cast<char*>(first ? p.first : p.second) + offset, fp32};
}

// A block computes BLOCK_EXTENT features of COLS coefficients: the gradients, or partial sums over the tokens of one split.
// Features lie along the rows of the product, so that with up to COLS coefficients each token is read once.
template <class S, int COLS>
__global__ void __launch_bounds__(THREADS, RESIDENT<S>) wgrad_bwd_kernel(WgradParams p) {
    DYNAMIC_SMEM(smem);
    using Wgrad = Product<S, COLS, false, false, Copies>;
    const int64_t f0 = static_cast<int64_t>(blockIdx.x) * BLOCK_EXTENT, c0 = static_cast<int64_t>(blockIdx.y) * COLS;
    const int64_t C = p.count, F = p.tokens.columns;
    const int64_t first_t = blockIdx.z * p.tokens_a_split, last_t = smaller(first_t + p.tokens_a_split, p.tokens.rows);
    typename Wgrad::Accumulators acc = {};
    Wgrad::run(acc, smem, p.tokens, f0, p.coefficients, c0, first_t, last_t);
    const float scaling = p.partial == nullptr ? p.scaling : 1.f;
    Wgrad::for_each_column([&](int n, int j, int col) {
        const int64_t c = c0 + col;
        if (c >= C) return;
        const Tensor out =
            p.partial == nullptr ? gradient_of(p, c, sizeof(S)) : Tensor{p.partial + (blockIdx.z * C + c) * F, true};
#pragma unroll
        for (int i = 0; i < Wgrad::WARP_ROWS / 8; ++i) {
            const int64_t f = f0 + Wgrad::row_of_lane() + i * 8;
            if (f < F) store<S>(out.data, f, out.fp32, scaling * acc[i / 2][n][i % 2 * 2 + j]);
        }
    });
}

// Reduces the partial sums of a split wgrad, in the order of the tokens.
template <class S>
__global__ void __launch_bounds__(THREADS) wgrad_sum_bwd_kernel(WgradParams p) {
    const int64_t F = p.tokens.columns, c = blockIdx.x, f = static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x;
    if (f >= F) return;
    float sum = 0.f;
    for (int64_t split = 0; split < p.splits; ++split) sum += p.partial[(split * p.count + c) * F + f];
    const Tensor out = gradient_of(p, c, sizeof(S));
    store<S>(out.data, f, out.fp32, p.scaling * sum);
}

void wgrad(Dtype dtype, WgradParams p, cudaStream_t stream) {
    const int64_t T = p.tokens.rows, F = p.tokens.columns;
    if (F == 0) return;
    with_dtype(dtype, [&](auto scalar) {
        with_columns(p.count, [&](auto columns) {
            using S = decltype(scalar);
            constexpr int COLS = decltype(columns)::value, SMEM = Product<S, COLS, false, false, Copies>::SMEM;
            // whole pipeline steps in every split but the last
            p.tokens_a_split = tiles(tiles(T, p.splits), BLOCK_K<S>) * static_cast<int64_t>(BLOCK_K<S>);
            p.splits = tiles(T, p.tokens_a_split);
            if (p.splits == 1) p.partial = nullptr;
            const dim3 grid(tiles(F, BLOCK_EXTENT), tiles(p.count, COLS), static_cast<unsigned>(p.splits));
            LAUNCH((wgrad_bwd_kernel<S, COLS>), grid, dim3(THREADS), SMEM, stream, p);
            check_launch("wgrad_bwd_kernel");
            if (p.splits == 1) return;
            LAUNCH(wgrad_sum_bwd_kernel<S>, dim3(static_cast<unsigned>(p.count), tiles(F, THREADS)), dim3(THREADS), 0,
                   stream, p);
            check_launch("wgrad_sum_bwd_kernel");
        });
    });
}

}  // namespace lmoe
