// SPDX-License-Identifier: Apache-2.0
// Expand: out[t,f] = base + scaling * sum_c coefficients[t,c] factors[c,f]
#include "expand.cuh"

#include "launch.cuh"

namespace lmoe {

// Coefficients that a block holds in shared memory: three pipeline steps fit next to the stages in what every GPU allows.
template <class S>
constexpr int HELD = 3 * BLOCK_K<S>;

// A block computes BLOCK_EXTENT tokens. It holds their coefficients and walks over the tiles of features of one group, so
// that it reads the coefficients once.
template <class S>
__global__ void __launch_bounds__(THREADS, RESIDENT<S>) expand_walk_kernel(ExpandParams p) {
    DYNAMIC_SMEM(smem);
    using E = Expand<S>;
    const int groups = static_cast<int>(p.groups), tiles = E::tiles_over(p.output.F), group = blockIdx.x % groups;
    const int64_t t0 = static_cast<int64_t>(blockIdx.x / groups) * BLOCK_EXTENT;
    const int count = static_cast<int>(p.coefficients.columns);
    S* held = reinterpret_cast<S*>(smem) + STAGES * E::Q::T::ELEMENTS;
    auto hold = [&](auto copies) {
        for (int k = 0; k < count; k += BLOCK_K<S>) copies.load(held + k / BLOCK_K<S> * E::P::T::ELEMENTS, count - k);
    };
    if (is_fast<S>(p.coefficients)) {
        hold(typename E::FastP(p.coefficients, t0, 0));
    } else {
        hold(SlowCopies<S, BLOCK_EXTENT, true>(p.coefficients, t0, 0));
    }
    const int first = static_cast<int>(int64_t{tiles} * group / groups),
              last = static_cast<int>(int64_t{tiles} * (group + 1) / groups);
    sweep<S>(smem, held, count, p.factors, p.output, t0, first, last);
}

// The same for any number of coefficients: a block computes one tile of features.
template <class S>
__global__ void __launch_bounds__(THREADS, RESIDENT<S>) expand_kernel(ExpandParams p) {
    DYNAMIC_SMEM(smem);
    const unsigned tiles = Expand<S>::tiles_over(p.output.F);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x / tiles) * BLOCK_EXTENT;
    const int64_t f0 = static_cast<int64_t>(blockIdx.x % tiles) * BLOCK_F;
    typename Expand<S>::Accumulators acc = {};
    Expand<S>::run(acc, smem, p.coefficients, t0, p.factors, f0, 0, p.coefficients.columns);
    store_tile<S>(p.output, acc, t0, f0);
}

void expand(Dtype dtype, const ExpandParams& p, cudaStream_t stream) {
    if (p.output.T == 0 || p.output.F == 0) return;
    with_dtype(dtype, [&](auto scalar) {
        using S = decltype(scalar);
        using E = Expand<S>;
        const unsigned token_tiles = tiles(p.output.T, BLOCK_EXTENT);
        if (p.coefficients.columns <= HELD<S>) {
            const int steps = static_cast<int>(tiles(p.coefficients.columns, BLOCK_K<S>));
            const int smem = STAGES * E::Q::T::BYTES + steps * E::P::T::BYTES;
            LAUNCH(expand_walk_kernel<S>, dim3(token_tiles * static_cast<unsigned>(p.groups)), dim3(THREADS), smem, stream,
                   p);
            check_launch("expand_walk_kernel");
        } else {
            LAUNCH(expand_kernel<S>, dim3(token_tiles * tiles(p.output.F, BLOCK_F)), dim3(THREADS), E::SMEM, stream, p);
            check_launch("expand_kernel");
        }
    });
}

}  // namespace lmoe
