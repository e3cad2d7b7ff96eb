// Forward: shrink and mix in one kernel, expand in a second one, which the backward uses for dx.
//
//     u[t,e,r] = sum_i x[t,i] lora_a[e,r,i];   logits[t,e] = sum_i x[t,i] gate_weight[e,i]      shrink
//     gates = softmax(logits);   h[t,r] = sum_e gates[t,e] u[t,e,r];   v[t,e,r] = gates[t,e] h[t,r]   mix
//     y = base + scaling * sum_e,r v[t,e,r] lora_b[e,r,o]                                      expand
#pragma once

#include "tiles.cuh"

namespace lmoe {

constexpr int BLOCK_T = 64;   // tokens
constexpr int BLOCK_F = 128;  // features of x, y or a factor
constexpr int BLOCK_C = 64;   // coefficients of wgrad: rank rows and gate rows

// Shrink takes its columns 128 at a time, and a rest of few (often the gate alone) in a narrow product.
template <class S>
using WideShrink = Product<S, BLOCK_T, 128, 2, true, true>;
template <class S>
using NarrowShrink = Product<S, BLOCK_T, 32, 2, true, true>;
template <class S>
using Expand = Product<S, BLOCK_T, BLOCK_F, 2, true, false>;

// store(t, column, value): every token of the tile against every row of `factors`.
template <class S, class Store>
__device__ __forceinline__ void shrink(unsigned char* smem, const Matrix& rows, int64_t t0, const Matrix& factors,
                                       Store store) {
    for (int64_t column = 0; column < factors.rows;) {
        auto keep = [&](int row, int col, float value) {
            if (t0 + row < rows.rows && column + col < factors.rows) store(t0 + row, column + col, value);
        };
        if (factors.rows - column > 32) {
            WideShrink<S>::for_each(WideShrink<S>::run(smem, rows, t0, factors, column, 0, rows.columns), keep);
            column += 128;
        } else {
            NarrowShrink<S>::for_each(NarrowShrink<S>::run(smem, rows, t0, factors, column, 0, rows.columns), keep);
            column += 32;
        }
        __syncthreads();  // the tile is read, and what it stored can be read by the whole block
    }
}

// Of equal logits the one of the lower expert is kept.
template <class S>
__device__ inline bool is_kept(const ForwardParams& p, const void* logits, int64_t row, int64_t e, float logit) {
    if (p.top_k == p.E) return true;
    int64_t before = 0;
    for (int64_t f = 0; f < p.E; ++f) {
        const float other = load<S>(logits, row + f, p.logits_fp32);
        before += other > logit || (other == logit && f < e);
    }
    return before < p.top_k;
}

// The gates of one token, from the logits that begin at element `row`, by one thread.
template <class S>
__device__ inline void gate_softmax(const ForwardParams& p, const void* logits, int64_t row, float* gates) {
    float largest = -INFINITY, sum = 0.f;
    for (int64_t e = 0; e < p.E; ++e) largest = fmaxf(largest, load<S>(logits, row + e, p.logits_fp32));
    for (int64_t e = 0; e < p.E; ++e) {
        const float logit = load<S>(logits, row + e, p.logits_fp32);
        gates[e] = is_kept<S>(p, logits, row, e, logit) ? expf(logit - largest) : 0.f;
        sum += gates[e];
    }
    for (int64_t e = 0; e < p.E; ++e) gates[e] /= sum;
}

// The gates of the block's tokens, one thread a token; ends with all threads in step.
template <class S>
__device__ __forceinline__ void gates_of_tile(const ForwardParams& p, int64_t t0, int tokens) {
    for (int i = threadIdx.x; i < tokens; i += THREADS) {
        gate_softmax<S>(p, p.logits, (t0 + i) * p.E, p.scratch + (t0 + i) * p.scratch_stride);
    }
    __syncthreads();
}

// v of one token and one rank, for all experts; u and v begin at its rank row.
template <class S>
__device__ __forceinline__ float mix(const ForwardParams& p, const float* gates, const S* u, S* v) {
    const int64_t u_step = p.experts_of_a == 1 ? 0 : p.R;
    float h = 0.f;
    if (p.factors) {
        for (int64_t e = 0; e < p.E; ++e) h += gates[e] * to_float(u[e * u_step]);
    }
    for (int64_t e = 0; e < p.E; ++e) {
        v[e * p.R] = from_float<S>(gates[e] * (p.factors ? h : to_float(u[e * u_step])));
    }
    return h;
}

// A block owns BLOCK_T tokens: it projects them onto all experts and the gate, then mixes them.
template <class S>
__global__ void __launch_bounds__(THREADS) shrink_fwd_kernel(ForwardParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T, rank_rows = p.experts_of_a * p.R;
    const int tokens = static_cast<int>(smaller(BLOCK_T, p.T - t0)), R = static_cast<int>(p.R);
    S* u = static_cast<S*>(p.u);
    S* v = static_cast<S*>(p.v);

    const Matrix x = matrix<S>(p.x, false, p.T, p.I, p.x_stride);
    const Matrix factors = stacked<S>(p.lora_a, p.lora_a_fp32, rank_rows, p.gate_weight, p.gate_weight_fp32, p.E, p.I);
    shrink<S>(smem, x, t0, factors, [&](int64_t t, int64_t column, float value) {
        if (column < rank_rows) {
            u[t * rank_rows + column] = from_float<S>(value);
        } else {
            static_cast<float*>(p.logits)[t * p.E + column - rank_rows] = value;
        }
    });
    gates_of_tile<S>(p, t0, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += THREADS) {
        const int64_t t = t0 + i / R, r = i % R;
        mix<S>(p, p.scratch + t * p.scratch_stride, u + t * rank_rows + r, v + t * p.v_stride + r);
    }
}

// out[t,f] = base + scaling * sum_c coefficients[t,c] factors[c,f]
template <class S>
__global__ void __launch_bounds__(THREADS) expand_kernel(ExpandParams p) {
    DYNAMIC_SMEM(smem);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_T, f0 = static_cast<int64_t>(blockIdx.y) * BLOCK_F;
    const int64_t T = p.coefficients.rows, F = p.factors.columns;
    const float* tile = Expand<S>::run(smem, p.coefficients, t0, p.factors, f0, 0, p.factors.rows);

    constexpr int VECTORS = BLOCK_F / VECTOR<S>;  // in a row of the tile
    for (int i = threadIdx.x; i < BLOCK_T * VECTORS; i += THREADS) {
        const int row = i / VECTORS, col = i % VECTORS * VECTOR<S>;
        const int64_t t = t0 + row, f = f0 + col;
        if (t >= T || f >= F) continue;
        const bool whole = p.vectors && f + VECTOR<S> <= F;
        const S* base = static_cast<const S*>(p.base) + (p.base == nullptr ? 0 : t * p.base_stride + f);
        S* out = static_cast<S*>(p.out) + t * F + f;
        alignas(16) S values[VECTOR<S>];
        if (p.base != nullptr && whole) {
            *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(base);
        } else {
#pragma unroll
            for (int j = 0; j < VECTOR<S>; ++j) values[j] = p.base != nullptr && f + j < F ? base[j] : from_float<S>(0.f);
        }
#pragma unroll
        for (int j = 0; j < VECTOR<S>; ++j) {
            values[j] = from_float<S>(to_float(values[j]) + p.scaling * tile[row * Expand<S>::OUT_STRIDE + col + j]);
        }
        if (whole) {
            store_vector(out, *reinterpret_cast<const uint4*>(values));
        } else {
#pragma unroll
            for (int j = 0; j < VECTOR<S>; ++j) {
                if (f + j < F) out[j] = values[j];
            }
        }
    }
}

}  // namespace lmoe
