// Forward: in one pass where tiles of tokens fill the chip, else stage by stage.
//
//     u[t,e,r] = sum_i x[t,i] lora_a[e,r,i];   logits[t,e] = sum_i x[t,i] gate_weight[e,i]      shrink
//     gates = softmax(logits);   h[t,r] = sum_e gates[t,e] u[t,e,r];   v[t,e,r] = gates[t,e] h[t,r]   mix
//     y = base + scaling * sum_e,r v[t,e,r] lora_b[e,r,o]                                      expand
//
// Stage by stage: shrink and mix in one kernel, or, where too few blocks had all of x's features to sum, shrink in parts and
// a mix that adds them up; then expand. The backward uses the shrink in parts for dv, and expand for dx.
#pragma once

#include "stages.cuh"

namespace lmoe {

constexpr int MIX_T = 4;  // tokens of a block that adds parts up and mixes

// Byte offsets in shared memory. First comes what the products need.
template <class S>
struct ForwardLayout {
    int64_t v, logits, gates, bytes;

    static __host__ __device__ ForwardLayout of(int64_t E, int64_t R) {
        constexpr int SHRINK = Shrink<S, WIDE<S>>::SMEM, SWEEP = Expand<S>::SWEEP_SMEM;
        ForwardLayout at = {};
        at.v = SHRINK > SWEEP ? SHRINK : SWEEP;  // (BLOCK_T, E R), whole steps of expand; before mix it holds u
        at.logits = at.v + (E * R + BLOCK_K<S> - 1) / BLOCK_K<S> * Expand<S>::P::T::BYTES;  // (BLOCK_T, E) fp32
        at.gates = at.logits + BLOCK_T * E * 4;                                             // (BLOCK_T, E) fp32
        at.bytes = at.gates + BLOCK_T * E * 4;
        return at;
    }
};

// A block owns BLOCK_T tokens from x to y: what lies between never leaves shared memory, but for u and the logits that a
// backward wants.
template <class S>
__global__ void __launch_bounds__(THREADS) forward_kernel(ForwardParams p) {
    DYNAMIC_SMEM(smem);
    const auto at = ForwardLayout<S>::of(p.E, p.R);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T;
    const int tokens = static_cast<int>(smaller(BLOCK_T, p.T - t0)), E = static_cast<int>(p.E), R = static_cast<int>(p.R);
    const int rank_rows = static_cast<int>(p.experts_of_a) * R;
    S* v = reinterpret_cast<S*>(smem + at.v);
    float* logits = reinterpret_cast<float*>(smem + at.logits);
    float* gates = reinterpret_cast<float*>(smem + at.gates);

    // zero where there is no token and no column: expand multiplies whole tiles
    for (int i = threadIdx.x; i < static_cast<int>(at.logits - at.v) / 16; i += THREADS) {
        reinterpret_cast<uint4*>(v)[i] = uint4{0, 0, 0, 0};
    }
    shrink<S>(smem, tokens_of<S>(p), t0, a_and_gate<S>(p), 0, p.I, [&](int64_t t, int64_t column, float value) {
        const int row = static_cast<int>(t - t0), c = static_cast<int>(column);
        save<S>(p, t, column, value);
        if (c < rank_rows) {
            v[Expand<S>::P::kept_at(row, c)] = from_float<S>(value);
        } else {
            logits[row * E + c - rank_rows] = value;
        }
    });
    const bool own = p.gate_weight != nullptr;
    gate_softmax<S>(p, own ? logits : p.logits, own ? 0 : t0 * E, gates, E, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += THREADS) {
        const int row = i / R;
        mix<S>(p, gates + row * E, v, v, i % R,
               [row](int64_t column) { return Expand<S>::P::kept_at(row, static_cast<int>(column)); });
    }
    // the first barrier of the sweep stands before its first read of v
    const Output y = output<S>(p.y, p.base, p.base_stride, p.T, p.O, p.scaling);
    Expand<S>::sweep(smem, v, b_of<S>(p), [&](const float* tile, int64_t o0) { store_tile<S>(y, tile, t0, o0); });
}

// A block owns BLOCK_T tokens: it projects them onto all experts and the gate, then mixes them.
template <class S>
__global__ void __launch_bounds__(THREADS) shrink_fwd_kernel(ForwardParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T;
    shrink<S>(smem, tokens_of<S>(p), t0, a_and_gate<S>(p), 0, p.I,
              [&](int64_t t, int64_t column, float value) { save<S>(p, t, column, value); });
    mix_tokens<S>(p, t0, static_cast<int>(smaller(BLOCK_T, p.T - t0)));
}

// A block owns BLOCK_T tokens and one part of their features.
template <class S>
__global__ void __launch_bounds__(THREADS) shrink_kernel(ShrinkParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T, C = p.factors.rows;
    const int64_t first = blockIdx.y * p.features_a_part, last = smaller(first + p.features_a_part, p.rows.columns);
    float* partial = p.partial + blockIdx.y * p.rows.rows * C;
    shrink<S>(smem, p.rows, t0, p.factors, first, last,
              [&](int64_t t, int64_t column, float value) { partial[t * C + column] = value; });
}

// u and the logits from the parts of the shrink, then v, of MIX_T tokens.
template <class S>
__global__ void __launch_bounds__(THREADS, 4) mix_fwd_kernel(ForwardParams p) {
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * MIX_T;
    const int tokens = static_cast<int>(smaller(MIX_T, p.T - t0));
    const int columns = static_cast<int>(p.experts_of_a * p.R + (p.gate_weight != nullptr ? p.E : 0));
    sum_parts(p, t0, tokens, columns, [&](int64_t t, int64_t column, float sum) { save<S>(p, t, column, sum); });
    mix_tokens<S>(p, t0, tokens);
}

// out[t,f] = base + scaling * sum_c coefficients[t,c] factors[c,f]
template <class S>
__global__ void __launch_bounds__(THREADS) expand_kernel(ExpandParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T, f0 = static_cast<int64_t>(blockIdx.y) * BLOCK_F;
    store_tile<S>(p.output, Expand<S>::run(smem, p.coefficients, t0, p.factors, f0, 0, p.factors.rows), t0, f0);
}

}  // namespace lmoe
