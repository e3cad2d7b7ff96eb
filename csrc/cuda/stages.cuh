// SPDX-License-Identifier: Apache-2.0
// Device code that the kernels of forward and backward share: shrink, softmax and mix, and the store of an expanded tile.
#pragma once

#include "tiles.cuh"

namespace lmoe {

constexpr int BLOCK_T = 64;   // tokens of a block
constexpr int BLOCK_F = 128;  // features of x, y or a factor
constexpr int BLOCK_C = 64;   // coefficients of wgrad: columns of du, dlogits or v
constexpr int MIX_T = 4;      // tokens of a block that reduces partial sums and mixes

template <class S, int COLUMNS>
using Shrink = Product<S, BLOCK_T, COLUMNS, 2, true, true>;
template <class S>
using Expand = Product<S, BLOCK_T, BLOCK_F, 2, true, false>;

// Shrink computes 160 columns at a time, so that eight experts of rank 16 and their gate read the tokens once; a rest of up
// to 64 columns takes a narrower product. Expected, not measured: the wide product is L2-bound, so padded columns are free.
// fp32 is bound by FMAs and needs two accumulators for each product: 96 columns at a time.
template <class S>
constexpr int WIDE = sizeof(S) == 4 ? 96 : 160;
constexpr int NARROW = 64;

template <class S>
__host__ __device__ constexpr int shrink_smem(int64_t columns) {
    static_assert(Shrink<S, NARROW>::SMEM <= Shrink<S, WIDE<S>>::SMEM,
                  "the narrow product takes more memory than the wide one");
    return columns > NARROW ? Shrink<S, WIDE<S>>::SMEM : Shrink<S, NARROW>::SMEM;
}

template <class Tile, class Store>
__device__ __forceinline__ int64_t shrink_columns(unsigned char* smem, const Matrix& tokens, int64_t t0,
                                                  const Matrix& factors, int64_t column, int64_t first, int64_t last,
                                                  Store store) {
    const float* tile = Tile::run(smem, tokens, t0, factors, column, first, last);
    Tile::for_each(tile, [&](int row, int col, float value) {
        if (t0 + row < tokens.rows && column + col < factors.rows) store(t0 + row, column + col, value);
    });
    __syncthreads();  // no thread still reads the tile, and the whole block sees what was stored
    return column + Tile::COLUMNS;
}

// store(t, column, value) for every token of the tile and row of `factors`: their dot product over features [first, last).
template <class S, class Store>
__device__ __forceinline__ void shrink(unsigned char* smem, const Matrix& tokens, int64_t t0, const Matrix& factors,
                                       int64_t first, int64_t last, Store store) {
    for (int64_t column = 0; column < factors.rows;) {
        if (factors.rows - column > NARROW) {
            column = shrink_columns<Shrink<S, WIDE<S>>>(smem, tokens, t0, factors, column, first, last, store);
        } else {
            column = shrink_columns<Shrink<S, NARROW>>(smem, tokens, t0, factors, column, first, last, store);
        }
    }
}

// store(t, column, sum) for some tokens: reduces the partial sums of a split shrink, in a fixed order.
template <class Store>
__device__ __forceinline__ void sum_parts(const ForwardParams& p, int64_t t0, int tokens, int columns, Store store) {
    for (int i = threadIdx.x; i < tokens * columns; i += THREADS) {
        float sum = 0.f;
        for (int64_t part = 0; part < p.shrink_parts; ++part) sum += p.partial[(part * p.T + t0) * columns + i];
        store(t0 + i / columns, i % columns, sum);
    }
    __syncthreads();  // the whole block sees what was stored
}

// x as a matrix, and the factors that shrink multiplies it with: the rows of all A, then the gate's.
template <class S>
__host__ __device__ inline Matrix tokens_of(const ForwardParams& p) {
    return matrix<S>(p.x.data, false, p.T, p.I, p.x.stride);
}
template <class S>
__host__ __device__ inline Matrix a_and_gate(const ForwardParams& p) {
    return stacked<S>(p.lora_a, p.experts_of_a * p.R, p.gate_weight, p.E, p.I);
}
template <class S>
__host__ __device__ inline Matrix b_of(const ForwardParams& p) {
    return matrix<S>(p.lora_b.data, p.lora_b.fp32, p.E * p.R, p.O, p.O);
}

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

// The gates of some tokens, from the logits in global memory into scratch.
template <class S>
__device__ __forceinline__ void gates_of_tokens(const ForwardParams& p, int64_t t0, int tokens) {
    gate_softmax<S>(p, p.logits, t0 * p.E, p.scratch + t0 * p.scratch_stride, p.scratch_stride, tokens);
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

// v of some tokens, from u and the logits in global memory.
template <class S>
__device__ __forceinline__ void mix_tokens(const ForwardParams& p, int64_t t0, int tokens) {
    const int R = static_cast<int>(p.R);
    gates_of_tokens<S>(p, t0, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += THREADS) {
        const int64_t t = t0 + i / R;
        const S* u = static_cast<const S*>(p.u) + t * p.experts_of_a * p.R;
        mix<S>(p, p.scratch + t * p.scratch_stride, u, static_cast<S*>(p.v.data) + t * p.v.stride, i % R);
    }
}

template <class S>
__host__ __device__ inline Output output(void* out, const void* base, int64_t base_stride, int64_t T, int64_t F,
                                         float scaling) {
    const bool aligned = on_16_bytes(out, F, sizeof(S)) && on_16_bytes(base, base_stride, sizeof(S));
    return {out, base, base_stride, T, F, aligned, scaling};
}

// Stores a tile of products that starts at token t0 and feature f0. Every thread loads several vectors of the base at once.
template <class S>
__device__ __forceinline__ void store_tile(const Output& p, const float* tile, int64_t t0, int64_t f0) {
    constexpr int VECTORS = BLOCK_F / VECTOR<S>;  // in a row of the tile
    constexpr int BATCH = 8;                      // vectors that a thread loads at once
    static_assert(BLOCK_T * VECTORS % (BATCH * THREADS) == 0, "the last batch is not full");
    for (int first = threadIdx.x; first < BLOCK_T * VECTORS; first += BATCH * THREADS) {
        alignas(16) S values[BATCH][VECTOR<S>];
        auto each = [&](auto f) {  // f(vector, its row and column in the tile, how many of its elements are inside)
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int row = (first + b * THREADS) / VECTORS, col = (first + b * THREADS) % VECTORS * VECTOR<S>;
                const int64_t inside = t0 + row < p.T ? smaller(VECTOR<S>, p.F - f0 - col) : 0;
                if (inside > 0) f(values[b], row, col, static_cast<int>(inside));
            }
        };
        each([&](S* vector, int row, int col, int inside) {
            const bool given = p.base != nullptr;
            const S* base = static_cast<const S*>(p.base) + (given ? (t0 + row) * p.base_stride + f0 + col : 0);
            if (given && p.aligned && inside == VECTOR<S>) {
                *reinterpret_cast<uint4*>(vector) = *reinterpret_cast<const uint4*>(base);
            } else {
#pragma unroll
                for (int j = 0; j < VECTOR<S>; ++j) vector[j] = given && j < inside ? base[j] : from_float<S>(0.f);
            }
        });
        each([&](S* vector, int row, int col, int inside) {
            S* out = static_cast<S*>(p.out) + (t0 + row) * p.F + f0 + col;
#pragma unroll
            for (int j = 0; j < VECTOR<S>; ++j) {
                const float product = tile[row * Expand<S>::OUT_STRIDE + col + j];
                vector[j] = from_float<S>(to_float(vector[j]) + p.scaling * product);
            }
            if (p.aligned && inside == VECTOR<S>) {
                store_vector(out, *reinterpret_cast<const uint4*>(vector));
            } else {
#pragma unroll
                for (int j = 0; j < VECTOR<S>; ++j) {
                    if (j < inside) out[j] = vector[j];
                }
            }
        });
    }
}

}  // namespace lmoe
