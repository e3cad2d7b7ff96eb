// SPDX-License-Identifier: Apache-2.0
// Backward: shrink of dy and the backward of mix, in one kernel or as a split shrink and a mix kernel; then expand, for dx;
// and the weight gradients.
//
//     dv[t,e,r] = scaling * sum_o dy[t,o] lora_b[e,r,o]                                        shrink
//     factors: dh = sum_e gates dv;  dgates = <dv, h> + <dh, u>;  du = gates dh                mix
//     outputs: dgates = <dv, u>;  du = gates dv
//     dlogits = softmax * (dgates - sum_e gates dgates) + dlogits_in                           dgates of dropped experts: 0
//     dx = [du, dlogits] [lora_a; gate_weight]                                                 expand
//     [dlora_a; dgate_weight] = [du, dlogits]^T x                                              wgrad
//     dlora_b = scaling * v^T dy                                                               wgrad
#pragma once

#include "stages.cuh"

namespace lmoe {

template <class S>
using Wgrad = Product<S, BLOCK_C, BLOCK_F, 2, false, false>;

template <class S>
__host__ __device__ inline Matrix dy_of(const BackwardParams& p) {
    return matrix<S>(p.dy.data, false, p.T, p.O, p.dy.stride);
}

// The columns of one token's row of scratch, in fp32.
struct Scratch {
    float *gates, *dgates, *h, *dh;  // (E), (E), (R), (R)

    static __device__ __forceinline__ Scratch of(const BackwardParams& p, int64_t t) {
        float* row = p.scratch + t * p.scratch_stride;
        return {row, row + p.E, row + 2 * p.E, row + 2 * p.E + p.R};
    }
};

// One token's row of the workspace du_dlogits.
template <class S>
__device__ __forceinline__ S* du_dlogits_of(const BackwardParams& p, int64_t t) {
    return static_cast<S*>(p.du_dlogits.data) + t * p.du_dlogits.stride;
}

// One token and one rank: h and dh to scratch, and du.
template <class S>
__device__ __forceinline__ void mix_bwd(const BackwardParams& p, int64_t t, int64_t r, float h, const S* dv) {
    const Scratch s = Scratch::of(p, t);
    S* du = du_dlogits_of<S>(p, t) + r;
    float dh = 0.f;
    for (int64_t e = 0; e < p.E; ++e) dh += s.gates[e] * to_float(dv[e * p.R]);
    s.h[r] = h;
    s.dh[r] = dh;
    const bool factors = p.mixing == Mixing::factors;
    if (p.experts_of_a == 1) {  // a shared A gathers from every expert: under "factors" dh times each gate
        if (factors && !p.renormalize) {
            float sum = 0.f;  // of the gates; it is 1 if they are renormalized
            for (int64_t e = 0; e < p.E; ++e) sum += s.gates[e];
            dh *= sum;
        }
        *du = from_float<S>(dh);
        return;
    }
    for (int64_t e = 0; e < p.E; ++e) du[e * p.R] = from_float<S>(s.gates[e] * (factors ? dh : to_float(dv[e * p.R])));
}

// The gradient of one gate: through B(t) and, under "factors", also through A(t).
template <class S>
__device__ __forceinline__ void gate_bwd(const BackwardParams& p, int64_t t, int64_t e) {
    const Scratch s = Scratch::of(p, t);
    const S* u = static_cast<const S*>(p.u) + (t * p.experts_of_a + (p.experts_of_a == 1 ? 0 : e)) * p.R;
    const S* dv = static_cast<const S*>(p.dv) + t * p.v.stride + e * p.R;
    const bool factors = p.mixing == Mixing::factors;
    float sum = 0.f;
    for (int64_t r = 0; r < p.R; ++r) {
        const float ur = to_float(u[r]);
        sum += to_float(dv[r]) * (factors ? s.h[r] : ur) + (factors ? s.dh[r] * ur : 0.f);
    }
    s.dgates[e] = sum;
}

// The backward of one token's softmax, to du_dlogits or to an outside router's gradient. A softmax over all experts gives
// dropped experts a gradient too. Their softmax is not in `gates`: it follows from the gate of the largest logit, whose
// expert is always kept, and the difference of the logits.
template <class S>
__device__ __forceinline__ void softmax_bwd(const BackwardParams& p, int64_t t) {
    const Scratch s = Scratch::of(p, t);
    S* dlogits = du_dlogits_of<S>(p, t) + p.experts_of_a * p.R;
    auto logit = [&](int64_t e) { return load<S>(p.logits, t * p.E + e); };
    float mean = 0.f, largest = -INFINITY, largest_gate = 0.f;
    for (int64_t e = 0; e < p.E; ++e) mean += s.gates[e] * s.dgates[e];
    for (int64_t e = 0; e < p.E && !p.renormalize; ++e) {
        largest = fmaxf(largest, logit(e));
        largest_gate = fmaxf(largest_gate, s.gates[e]);
    }
    for (int64_t e = 0; e < p.E; ++e) {
        float dlogit = s.gates[e] * (s.dgates[e] - mean);
        if (!p.renormalize && s.gates[e] == 0.f) dlogit = largest_gate * expf(logit(e) - largest) * -mean;
        if (p.dlogits_in != nullptr) dlogit += p.dlogits_in[t * p.E + e];
        if (p.gate_weight.data != nullptr) dlogits[e] = from_float<S>(dlogit);
        if (p.dlogits != nullptr) store<S>(p.dlogits, t * p.E + e, p.logits.fp32, dlogit);
    }
}

// v of some tokens, and du and dlogits from dv; with a null dv only v, which dlora_b needs.
template <class S>
__device__ __forceinline__ void mix_tokens_bwd(const BackwardParams& p, int64_t t0, int tokens) {
    if (p.dv == nullptr) return mix_tokens<S>(p, t0, tokens);
    const int E = static_cast<int>(p.E), R = static_cast<int>(p.R);  // in 32 bits: a 64-bit division is a function call
    gates_of_tokens<S>(p, t0, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += THREADS) {
        const int64_t t = t0 + i / R, r = i % R;
        const S* u = static_cast<const S*>(p.u) + t * p.experts_of_a * p.R;
        const float h = mix<S>(p, p.scratch + t * p.scratch_stride, u, static_cast<S*>(p.v.data) + t * p.v.stride, r);
        mix_bwd<S>(p, t, r, h, static_cast<const S*>(p.dv) + t * p.v.stride + r);
    }
    __syncthreads();  // all threads see h and dh in scratch
    for (int i = threadIdx.x; i < tokens * E; i += THREADS) gate_bwd<S>(p, t0 + i / E, i % E);
    __syncthreads();  // all threads see dgates in scratch
    for (int i = threadIdx.x; i < tokens; i += THREADS) softmax_bwd<S>(p, t0 + i);
}

template <class S>
__device__ __forceinline__ void store_dv(const BackwardParams& p, int64_t t, int64_t column, float value) {
    static_cast<S*>(p.dv)[t * p.v.stride + column] = from_float<S>(p.scaling * value);
}

// A block computes dv of BLOCK_T tokens and everything up to du and dlogits. Its registers are limited as those of
// shrink_fwd_kernel.
template <class S>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 4 ? 2 : 3) shrink_bwd_kernel(BackwardParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T;
    shrink<S>(smem, dy_of<S>(p), t0, b_of<S>(p), 0, p.O,
              [&](int64_t t, int64_t column, float value) { store_dv<S>(p, t, column, value); });
    mix_tokens_bwd<S>(p, t0, static_cast<int>(smaller(BLOCK_T, p.T - t0)));
}

// A block reduces the partial sums of MIX_T tokens to dv, unless it is null, then computes everything up to du and dlogits.
template <class S>
__global__ void __launch_bounds__(THREADS, 4) mix_bwd_kernel(BackwardParams p) {
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * MIX_T;
    const int tokens = static_cast<int>(smaller(MIX_T, p.T - t0));
    if (p.dv != nullptr) {
        sum_parts(p, t0, tokens, static_cast<int>(p.E * p.R),
                  [&](int64_t t, int64_t column, float sum) { store_dv<S>(p, t, column, sum); });
    }
    mix_tokens_bwd<S>(p, t0, tokens);
}

template <class S>
__device__ __forceinline__ void store_wgrad(const WgradParams& p, int64_t c, int64_t f, float value) {
    const int64_t F = p.tokens.columns;
    if (c < p.split) {
        store<S>(p.first, c * F + f, p.first_fp32, p.scaling * value);
    } else {
        store<S>(p.second, (c - p.split) * F + f, p.second_fp32, p.scaling * value);
    }
}

// scaling * sum_t coefficients[t,c] tokens[t,f], to the gradients; or a partial sum over the tokens of one split.
template <class S>
__global__ void __launch_bounds__(THREADS) wgrad_bwd_kernel(WgradParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t f0 = static_cast<int64_t>(blockIdx.x) * BLOCK_F, c0 = static_cast<int64_t>(blockIdx.y) * BLOCK_C;
    const int64_t C = p.coefficients.columns, F = p.tokens.columns;
    const int64_t first_t = blockIdx.z * p.tokens_a_split, last_t = smaller(first_t + p.tokens_a_split, p.tokens.rows);
    const float* tile = Wgrad<S>::run(smem, p.coefficients, c0, p.tokens, f0, first_t, last_t);

    Wgrad<S>::for_each(tile, [&](int row, int col, float value) {
        const int64_t c = c0 + row, f = f0 + col;
        if (c >= C || f >= F) return;
        if (p.partial == nullptr) {
            store_wgrad<S>(p, c, f, value);
        } else {
            p.partial[(blockIdx.z * C + c) * F + f] = value;
        }
    });
}

// Reduces the partial sums of a split wgrad, in the order of the tokens.
template <class S>
__global__ void __launch_bounds__(THREADS) wgrad_sum_bwd_kernel(WgradParams p) {
    const int64_t C = p.coefficients.columns, F = p.tokens.columns, c = blockIdx.x;
    const int64_t f = static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x;
    if (f >= F) return;
    float sum = 0.f;
    for (int64_t split = 0; split < p.splits; ++split) sum += p.partial[(split * C + c) * F + f];
    store_wgrad<S>(p, c, f, sum);
}

}  // namespace lmoe
