// SPDX-License-Identifier: Apache-2.0
// Launches the backward: shrink of dy and the backward of mix, expand into dx, wgrad over x and over dy.
#include "backward.cuh"

#include "launch.cuh"

namespace lmoe {
namespace {

template <class S>
void wgrad(WgradParams p, const BackwardParams& backward, cudaStream_t stream) {
    const int64_t T = p.tokens.rows, C = p.coefficients.columns, F = p.tokens.columns;
    if (F == 0) return;
    // whole pipeline steps in every split but the last
    p.tokens_a_split = tiles(tiles(T, backward.wgrad_splits), BLOCK_K<S>) * BLOCK_K<S>;
    p.splits = tiles(T, p.tokens_a_split);
    p.partial = p.splits > 1 ? backward.partial : nullptr;
    const dim3 grid(tiles(F, BLOCK_F), tiles(C, BLOCK_C), static_cast<unsigned>(p.splits));
    LAUNCH(wgrad_bwd_kernel<S>, grid, dim3(THREADS), Wgrad<S>::SMEM, stream, p);
    check_launch("wgrad_bwd_kernel");
    if (p.splits > 1) {
        LAUNCH(wgrad_sum_bwd_kernel<S>, dim3(static_cast<unsigned>(C), tiles(F, THREADS)), dim3(THREADS), 0, stream, p);
        check_launch("wgrad_sum_bwd_kernel");
    }
}

template <class S>
void shrink_and_mix(const BackwardParams& p, cudaStream_t stream) {
    if (p.dv != nullptr && p.shrink_parts == 1) {
        const int smem = shrink_smem<S>(p.E * p.R);
        allow_shared_memory(shrink_bwd_kernel<S>, smem);
        LAUNCH(shrink_bwd_kernel<S>, dim3(tiles(p.T, BLOCK_T)), dim3(THREADS), smem, stream, p);
        check_launch("shrink_bwd_kernel");
        return;
    }
    if (p.dv != nullptr) shrink_in_parts(p.dtype, {dy_of<S>(p), b_of<S>(p), p.partial, p.shrink_parts, 0}, stream);
    LAUNCH(mix_bwd_kernel<S>, dim3(tiles(p.T, MIX_T)), dim3(THREADS), 0, stream, p);
    check_launch("mix_bwd_kernel");
}

template <class S>
void backward_of(const BackwardParams& p, cudaStream_t stream) {
    static_assert(Wgrad<S>::SMEM <= 48 << 10, "more than 48 KB must be allowed for each kernel");
    shrink_and_mix<S>(p, stream);
    const int64_t du_columns = p.experts_of_a * p.R, dlogits_columns = p.gate_weight.data != nullptr ? p.E : 0;
    const auto* du_dlogits = static_cast<const S*>(p.du_dlogits.data);
    if (p.dx != nullptr) {
        const Matrix both = matrix<S>(du_dlogits, false, p.T, du_columns + dlogits_columns, p.du_dlogits.stride);
        expand(p.dtype, {both, a_and_gate<S>(p), output<S>(p.dx, nullptr, 0, p.T, p.I, 1.f)}, stream);
    }
    if (p.dlora_a.data != nullptr || p.dgate_weight.data != nullptr) {
        WgradParams w = {};
        const int64_t first = p.dlora_a.data != nullptr ? 0 : du_columns;  // only the columns whose gradient is wanted
        const int64_t last = p.dgate_weight.data != nullptr ? du_columns + dlogits_columns : du_columns;
        w.coefficients = matrix<S>(du_dlogits + first, false, p.T, last - first, p.du_dlogits.stride);
        w.tokens = tokens_of<S>(p);
        w.first = p.dlora_a.data;
        w.first_fp32 = p.dlora_a.fp32;
        w.second = p.dgate_weight.data;
        w.second_fp32 = p.dgate_weight.fp32;
        w.split = du_columns - first;
        w.scaling = 1.f;
        wgrad<S>(w, p, stream);
    }
    if (p.dlora_b.data != nullptr) {
        WgradParams w = {};
        w.coefficients = matrix<S>(p.v.data, false, p.T, p.E * p.R, p.v.stride);
        w.tokens = dy_of<S>(p);
        w.first = p.dlora_b.data;
        w.first_fp32 = p.dlora_b.fp32;
        w.split = p.E * p.R;
        w.scaling = p.scaling;
        wgrad<S>(w, p, stream);
    }
}

}  // namespace

void backward(const BackwardParams& p, int device, void* stream) {
    if (p.T == 0) return;
    const DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto scalar) { backward_of<decltype(scalar)>(p, static_cast<cudaStream_t>(stream)); });
}

}  // namespace lmoe
