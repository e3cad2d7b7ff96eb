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

// join of the values of `lanes` lanes in sequence, a power of two: the same bits in each of them. All lanes of the warp call
// it.
template <class T, class Join>
__device__ __forceinline__ T over_lanes(T value, int lanes, Join join) {
    for (int flip = lanes >> 1; flip > 0; flip >>= 1) value = join(value, __shfl_xor_sync(~0u, value, flip));
    return value;
}
__device__ __forceinline__ float largest_of(float value, int lanes) {
    return over_lanes(value, lanes, [](float a, float b) { return fmaxf(a, b); });
}
template <class T>
__device__ __forceinline__ T sum_of(T value, int lanes) {
    return over_lanes(value, lanes, [](T a, T b) { return a + b; });
}

// The softmax of one token's logits. Kept are the experts whose logit is above `limit`, and of those whose logit equals it
// the experts up to `last`.
struct Softmax {
    float largest, sum, limit;
    int last;

    __device__ __forceinline__ bool keeps(float logit, int e) const {  // NaN: it must show in the results
        return !(logit < limit || (logit == limit && e > last));
    }
    __device__ __forceinline__ float weight(float logit) const { return expf(logit - largest) / sum; }
    __device__ __forceinline__ float gate(float logit, int e) const { return keeps(logit, e) ? weight(logit) : 0.f; }
};

// Finds limit and last for the top_k largest of at most as many logits as there are lanes, by the place of each among them.
template <class Logit>
__device__ __forceinline__ void limit_by_place(Softmax& softmax, int E, int top_k, int lane, int lanes, Logit logit) {
    int width = 1;
    while (width < E) width *= 2;
    const float own = lane < E ? logit(lane) : -INFINITY;
    int before = 0;
#pragma unroll 1
    for (int flip = 1; flip < width; ++flip) {
        const float other = __shfl_xor_sync(~0u, own, flip);
        before += other > own || (other == own && (lane ^ flip) < lane);
    }
    const bool is_last = lane < E && before == top_k - 1;
    softmax.limit = largest_of(is_last ? own : -INFINITY, lanes);
    softmax.last = sum_of(is_last ? lane : 0, lanes);
}

// Numbers in the order of their keys; 0 and -0 are equal, and NaN is the largest.
__device__ __forceinline__ uint32_t key_of(float number) {
    const float unsigned_zero = number + 0.f;
    uint32_t bits;
    memcpy(&bits, &unsigned_zero, sizeof bits);
    if (number != number) return ~0u;
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float number_of(uint32_t key) {
    const uint32_t bits = key >> 31 ? key & ~(1u << 31) : ~key;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

// The same for any number of logits: bit by bit, the largest key that at least top_k logits reach. If more of them reach it,
// some are equal to it, and the last index that is kept is found in the same way.
template <class Logit>
__device__ __forceinline__ void limit_by_bits(Softmax& softmax, int E, int top_k, int lane, int lanes, Logit logit) {
    auto count = [&](auto is_counted) {
        int own = 0;
#pragma unroll 1
        for (int e = lane; e < E; e += lanes) own += is_counted(key_of(logit(e)), e);
        return sum_of(own, lanes);
    };
    uint32_t limit = 0;
    int reaching = E;
#pragma unroll 1
    for (uint32_t bit = 1u << 31; bit > 0 && reaching > top_k; bit /= 2) {
        const int these = count([&](uint32_t key, int) { return key >= (limit | bit); });
        if (these >= top_k) limit |= bit, reaching = these;
    }
    softmax.limit = number_of(limit);
    if (reaching == top_k) return;
    const int equal = top_k - count([&](uint32_t key, int) { return key > limit; });
    int bit = 1;
    while (bit < E) bit *= 2;
    softmax.last = 0;
#pragma unroll 1
    for (; bit > 0; bit /= 2) {
        const int end = softmax.last + bit;
        if (count([&](uint32_t key, int e) { return key == limit && e < end; }) < equal) softmax.last = end;
    }
}

// The softmax of one token with the logits logit(e). Some lanes in sequence, a power of two, share its experts: lane l of
// them asks for the logits l, l + lanes, ... All lanes of the warp call it. Of equal logits, the expert with the lower index
// is kept.
template <class Logit>
__device__ __forceinline__ Softmax softmax_of(const ForwardParams& p, int lane, int lanes, Logit logit) {
    const int E = static_cast<int>(p.E), top_k = static_cast<int>(p.top_k);
    Softmax softmax = {-INFINITY, 0.f, -INFINITY, E};
#pragma unroll 1
    for (int e = lane; e < E; e += lanes) softmax.largest = fmaxf(softmax.largest, logit(e));
    softmax.largest = largest_of(softmax.largest, lanes);
    if (top_k < E) {
        if (E <= lanes) {
            limit_by_place(softmax, E, top_k, lane, lanes, logit);
        } else {
            limit_by_bits(softmax, E, top_k, lane, lanes, logit);
        }
    }
#pragma unroll 1
    for (int e = lane; e < E; e += lanes) {
        const float number = logit(e);
        if (!p.renormalize || softmax.keeps(number, e)) softmax.sum += expf(number - softmax.largest);
    }
    softmax.sum = sum_of(softmax.sum, lanes);
    return softmax;
}

// The gates of some tokens: gates[t * E + e] from logits[first + t * E + e]. All threads of the block call it; it
// ends with a barrier. As many lanes as there are experts, at most 32, share the experts of one token. Given gates are
// copied.
template <class S>
__device__ __forceinline__ void gate_softmax(const ForwardParams& p, const Tensor& logits, int64_t first, float* gates,
                                             int tokens) {
    const int E = static_cast<int>(p.E);
    if (p.gates_given) {
        for (int i = static_cast<int>(threadIdx.x); i < tokens * E; i += static_cast<int>(blockDim.x)) {
            gates[i] = load<S>(logits, first + i);
        }
    } else {
        int lanes = 1;  // for one token, a power of two
        while (lanes < E && lanes < 32) lanes *= 2;
        const int t = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
        for (int t0 = 0; t0 < tokens; t0 += static_cast<int>(blockDim.x) / lanes) {  // all lanes stay for the shuffles
            const bool inside = t0 + t < tokens;
            const int64_t row = first + (inside ? t0 + t : 0) * p.E;
            float* out = gates + (t0 + t) * p.E;
            auto logit = [&](int e) { return load<S>(logits, row + e); };
            const Softmax softmax = softmax_of(p, lane, lanes, logit);
            for (int e = lane; inside && e < E; e += lanes) out[e] = softmax.gate(logit(e), e);
        }
    }
    __syncthreads();  // all threads see the gates
}

// v of one token and rank r, for all experts, from the token's u, which may lie in the same memory. at(c) is the index of
// column c. Iterate experts in reverse: with a shared A, v[0] aliases the only u and must be written last.
template <class S, class At>
__device__ __forceinline__ void mix(const ForwardParams& p, const float* gates, const S* u, S* v, int64_t r, At at) {
    const int64_t u_step = p.experts_of_a == 1 ? 0 : p.R;
    float h = 0.f;
    if (p.mixing == Mixing::factors) {
        for (int64_t e = 0; e < p.E; ++e) h += gates[e] * to_float(u[at(e * u_step + r)]);
    }
    for (int64_t e = p.E - 1; e >= 0; --e) {
        v[at(e * p.R + r)] = from_float<S>(gates[e] * (p.mixing == Mixing::factors ? h : to_float(u[at(e * u_step + r)])));
    }
}

// The same for a token whose columns are contiguous.
template <class S>
__device__ __forceinline__ void mix(const ForwardParams& p, const float* gates, const S* u, S* v, int64_t r) {
    mix<S>(p, gates, u, v, r, [](int64_t column) { return column; });
}

}  // namespace lmoe
