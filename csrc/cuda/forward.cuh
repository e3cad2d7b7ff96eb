// SPDX-License-Identifier: Apache-2.0
// Forward: in one pass where tiles of tokens fill the GPU, otherwise stage by stage.
//
//     u[t,e,r] = sum_i x[t,i] lora_a[e,r,i];   logits[t,e] = sum_i x[t,i] gate_weight[e,i] + gate_bias[e]   shrink
//     gates = softmax(logits);   h[t,r] = sum_e gates[t,e] u[t,e,r];   v[t,e,r] = gates[t,e] h[t,r]   mix
//     y = base + scaling * sum_e,r v[t,e,r] lora_b[e,r,o]                                      expand
//
// Stage by stage: shrink and mix in one kernel, then expand. With too few tiles of tokens to fill the GPU, shrink is split
// over x's features (split-K), and mix is a kernel of its own that reduces the partial sums.
#pragma once

#include "stages.cuh"

namespace lmoe {

// Byte offsets in shared memory. The memory of the products comes first.
template <class S>
struct ForwardLayout {
    int64_t v, logits, gates, bytes;

    static __host__ __device__ ForwardLayout of(int64_t E, int64_t R) {
        constexpr int SHRINK = Shrink<S, WIDE<S>>::SMEM, SWEEP = Expand<S>::SWEEP_SMEM;
        ForwardLayout at = {};
        at.v = SHRINK > SWEEP ? SHRINK : SWEEP;  // (BLOCK_T, E R), whole pipeline steps; holds u until mix
        at.logits = at.v + (E * R + BLOCK_K<S> - 1) / BLOCK_K<S> * Expand<S>::P::T::BYTES;  // (BLOCK_T, E) fp32
        at.gates = at.logits + BLOCK_T * E * 4;                                             // (BLOCK_T, E) fp32
        at.bytes = at.gates + BLOCK_T * E * 4;
        return at;
    }
};

// A block computes BLOCK_T tokens from x to y. Everything in between stays in shared memory; u and the logits are also
// written to global memory if they are saved for the backward.
template <class S>
__global__ void __launch_bounds__(THREADS) forward_kernel(ForwardParams p) {
    DYNAMIC_SMEM(smem);
    const auto at = ForwardLayout<S>::of(p.E, p.R);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T;
    const int tokens = static_cast<int>(smaller(BLOCK_T, p.T - t0)), E = static_cast<int>(p.E), R = static_cast<int>(p.R);
    const int u_columns = static_cast<int>(p.experts_of_a) * R;
    S* v = reinterpret_cast<S*>(smem + at.v);
    float* logits = reinterpret_cast<float*>(smem + at.logits);
    float* gates = reinterpret_cast<float*>(smem + at.gates);

    // expand multiplies whole tiles: zeros where there are no tokens and columns
    for (int i = threadIdx.x; i < static_cast<int>(at.logits - at.v) / 16; i += THREADS) {
        reinterpret_cast<uint4*>(v)[i] = uint4{0, 0, 0, 0};
    }
    shrink<S>(smem, tokens_of<S>(p), t0, a_and_gate<S>(p), 0, p.I, [&](int64_t t, int64_t column, float value) {
        const int row = static_cast<int>(t - t0), c = static_cast<int>(column);
        save_projection<S>(p, t, column, value);
        if (c < u_columns) {
            v[Expand<S>::P::kept_at(row, c)] = from_float<S>(value);
        } else {
            logits[row * E + c - u_columns] = logit_of<S>(p, c - u_columns, value);
        }
    });
    const bool has_gate = p.gate_weight.data != nullptr;
    gate_softmax<S>(p, has_gate ? Tensor{logits, true} : p.logits, has_gate ? 0 : t0 * E, gates, E, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += THREADS) {
        const int row = i / R;
        mix<S>(p, gates + row * E, v, v, i % R,
               [row](int64_t column) { return Expand<S>::P::kept_at(row, static_cast<int>(column)); });
    }
    // v needs no barrier here: the sweep has one before its first read of v
    const Output y = output<S>(p.y, p.base.data, p.base.stride, p.T, p.O, p.scaling);
    Expand<S>::sweep(smem, v, b_of<S>(p), [&](const float* tile, int64_t o0) { store_tile<S>(y, tile, t0, o0); });
}

// A block projects BLOCK_T tokens onto all experts and the gate, then mixes them. Three blocks on a multiprocessor leave too
// few registers for fp32.
template <class S>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 4 ? 2 : 3) shrink_fwd_kernel(ForwardParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T;
    shrink<S>(smem, tokens_of<S>(p), t0, a_and_gate<S>(p), 0, p.I,
              [&](int64_t t, int64_t column, float value) { save_projection<S>(p, t, column, value); });
    mix_tokens<S>(p, t0, static_cast<int>(smaller(BLOCK_T, p.T - t0)));
}

// A block reduces the partial sums of MIX_T tokens to u and the logits, then computes v.
template <class S>
__global__ void __launch_bounds__(THREADS, 4) mix_fwd_kernel(ForwardParams p) {
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * MIX_T;
    const int tokens = static_cast<int>(smaller(MIX_T, p.T - t0));
    const int columns = static_cast<int>(p.experts_of_a * p.R + (p.gate_weight.data != nullptr ? p.E : 0));
    sum_parts(p, t0, tokens, columns, [&](int64_t t, int64_t column, float sum) { save_projection<S>(p, t, column, sum); });
    mix_tokens<S>(p, t0, tokens);
}

}  // namespace lmoe
