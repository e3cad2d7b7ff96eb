// SPDX-License-Identifier: Apache-2.0
// The gates of tokens, and what they average: softmax over the experts kept, and mix.
#pragma once

#include "matrix.cuh"

namespace lmoe {

// The logit of expert e, from the complete dot product of a token with the gate's row. Never from a partial sum: the bias is
// added once.
template <class S>
__device__ __forceinline__ float logit_of(const ForwardParams& p, int64_t e, float dot) {
    return p.gate_bias.data == nullptr ? dot : dot + load<S>(p.gate_bias, e);
}

// Saves one column of the product of x with a_and_gate, an element of u or a logit, unless it is not wanted.
template <class S>
__device__ __forceinline__ void save_projection(const ForwardParams& p, int64_t t, int64_t column, float value) {
    const int64_t u_columns = p.experts_of_a * p.R;
    if (column < u_columns) {
        if (p.u != nullptr) static_cast<S*>(p.u)[t * u_columns + column] = from_float<S>(value);
    } else if (p.logits.data != nullptr) {
        const int64_t e = column - u_columns;
        static_cast<float*>(p.logits.data)[t * p.E + e] = logit_of<S>(p, e, value);
    }
}

// Of equal logits, the expert with the lower index is kept.
template <class S>
__device__ inline bool is_kept(const ForwardParams& p, const Tensor& logits, int64_t row, int64_t e, float logit) {
    if (p.top_k == p.E) return true;
    int64_t before = 0;
    for (int64_t f = 0; f < p.E; ++f) {
        const float other = load<S>(logits, row + f);
        before += other > logit || (other == logit && f < e);
    }
    return before < p.top_k;
}

// The gates of some tokens: gates[t * gates_stride + e] from logits[first + t * E + e]. All threads of the block call it; it
// ends with a barrier. As many lanes as there are experts, at most 32, share the experts of one token.
template <class S>
__device__ __forceinline__ void gate_softmax(const ForwardParams& p, const Tensor& logits, int64_t first, float* gates,
                                             int64_t gates_stride, int tokens) {
    const int E = static_cast<int>(p.E);
    int lanes = 1;  // for one token, a power of two
    while (lanes < E && lanes < 32) lanes *= 2;
    const int t = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
    for (int t0 = 0; t0 < tokens; t0 += static_cast<int>(blockDim.x) / lanes) {  // all lanes stay for the shuffles
        const bool inside = t0 + t < tokens;
        const int64_t row = first + (inside ? t0 + t : 0) * p.E;
        float* out = gates + (t0 + t) * gates_stride;
        float largest = -INFINITY, sum = 0.f;
        for (int e = lane; e < E; e += lanes) largest = fmaxf(largest, load<S>(logits, row + e));
        for (int flip = lanes / 2; flip > 0; flip /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, flip));
        for (int e = lane; inside && e < E; e += lanes) {
            const float logit = load<S>(logits, row + e);
            const bool kept = is_kept<S>(p, logits, row, e, logit);
            const float weight = kept || !p.renormalize ? expf(logit - largest) : 0.f;
            sum += weight;
            out[e] = kept ? weight : 0.f;
        }
        for (int flip = lanes / 2; flip > 0; flip /= 2) sum += __shfl_xor_sync(~0u, sum, flip);
        for (int e = lane; inside && e < E; e += lanes) out[e] /= sum;
    }
    __syncthreads();  // all threads see the gates
}

// v of one token and rank r, for all experts, from the token's u, which may lie in the same memory. at(c) is the index of
// column c. Iterate experts in reverse: with a shared A, v[0] aliases the only u and must be written last.
template <class S, class At>
__device__ __forceinline__ float mix(const ForwardParams& p, const float* gates, const S* u, S* v, int64_t r, At at) {
    const int64_t u_step = p.experts_of_a == 1 ? 0 : p.R;
    float h = 0.f;
    if (p.mixing == Mixing::factors) {
        for (int64_t e = 0; e < p.E; ++e) h += gates[e] * to_float(u[at(e * u_step + r)]);
    }
    for (int64_t e = p.E - 1; e >= 0; --e) {
        v[at(e * p.R + r)] = from_float<S>(gates[e] * (p.mixing == Mixing::factors ? h : to_float(u[at(e * u_step + r)])));
    }
    return h;
}

// The same for a token whose columns are contiguous.
template <class S>
__device__ __forceinline__ float mix(const ForwardParams& p, const float* gates, const S* u, S* v, int64_t r) {
    return mix<S>(p, gates, u, v, r, [](int64_t column) { return column; });
}

}  // namespace lmoe
