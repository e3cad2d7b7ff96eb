// SPDX-License-Identifier: Apache-2.0
// Forward of few tokens in ONE cooperative launch, made for CUDA graphs: shrink, a barrier of the grid, mix and expand.
//
// Shrink: a warp computes the dot products of one row of [lora_a; gate_weight] with a chunk of x's features, for all tokens;
// these partial sums go to `partial` and are reduced in a fixed order after the barrier. Mix: it is little work, so every
// block repeats it. Expand: a block computes `column_tile` columns of y; the copy of its part of lora_b to shared memory
// starts before the barrier. Every weight is read from global memory once.
#pragma once

#include "gates.cuh"

namespace lmoe {

constexpr int DECODE_WARPS = 8, DECODE_THREADS = DECODE_WARPS * 32;
constexpr int LANE_FEATURES = 8;  // features per lane and vector load
constexpr int TOKEN_GROUP = 8;    // tokens whose sums a thread keeps in registers
constexpr int SUMS = 4;           // columns whose partial sums a thread reduces at a time

// Vector loads of a row, and of each of TOKENS tokens, that a lane has in flight. Few tokens are bound by memory latency, so
// this covers nearly a whole chunk, within 128 registers.
template <class S, int TOKENS>
constexpr int BATCH = sizeof(S) * TOKENS > 16 ? 2 : 4;

// Byte offsets in shared memory.
struct DecodeLayout {
    int64_t factors, u, v, logits, gates, sums, bytes;

    static __host__ __device__ DecodeLayout of(const DecodeParams& p, int64_t size) {
        auto padded = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
        DecodeLayout at = {};
        at.factors = 0;                                                // (E R, column_tile)
        at.u = at.factors + padded(p.E * p.R * p.column_tile * size);  // (T, experts_of_a R)
        at.v = at.u + padded(p.T * p.experts_of_a * p.R * size);       // (T, E R)
        at.logits = at.v + padded(p.T * p.E * p.R * size);             // (T, E) fp32
        at.gates = at.logits + padded(p.T * p.E * 4);                  // (T, E) fp32
        at.sums = at.gates + padded(p.T * p.E * 4);                    // (DECODE_WARPS, TOKEN_GROUP, column_tile) fp32
        at.bytes = at.sums + DECODE_WARPS * TOKEN_GROUP * p.column_tile * 4;
        return at;
    }
};

// LANE_FEATURES features in their own dtype, loaded from a multiple of 16 bytes.
template <class Element>
struct Features {
    alignas(16) Element element[LANE_FEATURES];

    __device__ __forceinline__ void load(const Element* from) {
#pragma unroll
        for (int i = 0; i < LANE_FEATURES / VECTOR<Element>; ++i) {
            reinterpret_cast<uint4*>(element)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
    }
};

// sum[i] += this lane's share of the dot product of the row `weights` with token i of x. I is a multiple of LANE_FEATURES
// and all rows start on multiples of 16 bytes. All loads of a batch come before the first use of one, and none is in a
// branch, so that they overlap: instead of features from `last` on, a lane loads the last ones before it, and does not add
// them.
template <class S, class W, int TOKENS>
__device__ __forceinline__ void dot_vectors(float (&sum)[TOKENS], const W* weights, const S* x, int64_t x_stride, int tokens,
                                            int first, int last) {
    constexpr int STEPS = BATCH<S, TOKENS>, STRIDE = 32 * LANE_FEATURES;
    for (int col = first + threadIdx.x % 32 * LANE_FEATURES; col < last; col += STEPS * STRIDE) {
        Features<W> weight[STEPS];
        Features<S> features[STEPS][TOKENS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int at = static_cast<int>(smaller(col + step * STRIDE, last - LANE_FEATURES));
            weight[step].load(weights + at);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) features[step][i].load(x + smaller(i, tokens - 1) * x_stride + at);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const bool inside = col + step * STRIDE < last;
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                float dot = 0.f;
#pragma unroll
                for (int j = 0; j < LANE_FEATURES; ++j) {
                    dot += to_float(features[step][i].element[j]) * to_float(weight[step].element[j]);
                }
                sum[i] = inside ? sum[i] + dot : sum[i];
            }
        }
    }
}

// The same for one token and rows of any alignment.
template <class S>
__device__ __forceinline__ void dot_anywhere(float (&sum)[1], const Matrix& factors, int64_t c, const Matrix& x, int64_t t,
                                             int first, int last) {
    for (int col = first + threadIdx.x % 32 * LANE_FEATURES; col < last; col += 32 * LANE_FEATURES) {
        float weights[LANE_FEATURES], features[LANE_FEATURES], dot = 0.f;
        Span::of<LANE_FEATURES>(factors, c, col, factors.rows).load<S>(weights);
        Span::of<LANE_FEATURES>(x, t, col, x.rows).load<S>(features);
#pragma unroll
        for (int j = 0; j < LANE_FEATURES; ++j) dot += features[j] * weights[j];
        sum[0] += dot;
    }
}

// One warp computes partial[chunk, t, c] for one row c of the factors and one chunk of features, TOKENS tokens at a time.
template <class S, int TOKENS, bool VECTORS>
__device__ __forceinline__ void shrink_chunk(const DecodeParams& p, const Matrix& x, const Matrix& factors, int item) {
    const int rows = static_cast<int>(factors.rows), T = static_cast<int>(p.T), lane = threadIdx.x % 32;
    const int c = item % rows, chunk = item / rows;  // in 32 bits: a 64-bit division is a function call
    const int first = chunk * static_cast<int>(p.chunk), last = static_cast<int>(smaller(first + p.chunk, p.I));
    for (int t0 = 0; t0 < T; t0 += TOKENS) {
        float sum[TOKENS] = {};
        if constexpr (VECTORS) {
            const Span row = Span::of<LANE_FEATURES>(factors, c, 0, rows);
            const S* tokens = static_cast<const S*>(x.first) + t0 * x.stride;
            if (row.fp32) {
                dot_vectors(sum, static_cast<const float*>(row.data) + row.index, tokens, x.stride, T - t0, first, last);
            } else {
                dot_vectors(sum, static_cast<const S*>(row.data) + row.index, tokens, x.stride, T - t0, first, last);
            }
        } else {
            dot_anywhere<S>(sum, factors, c, x, t0, first, last);
        }
#pragma unroll
        for (int flip = 16; flip > 0; flip /= 2) {
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], flip);
        }
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            if (lane == i && t0 + i < T) p.partial[(static_cast<int64_t>(chunk) * T + t0 + i) * rows + c] = sum[i];
        }
    }
}

// All rows and chunks, shared among the warps of the grid.
template <class S>
__device__ __forceinline__ void shrink_decode(const DecodeParams& p, const Matrix& x, const Matrix& factors) {
    const bool aligned = x.first_aligned && factors.first_aligned && (factors.second == nullptr || factors.second_aligned);
    const int items = static_cast<int>(p.chunks * factors.rows), warps = static_cast<int>(gridDim.x) * DECODE_WARPS;
    for (int item = static_cast<int>(blockIdx.x * DECODE_WARPS + threadIdx.x / 32); item < items; item += warps) {
        if (!aligned || p.I % LANE_FEATURES != 0) {
            shrink_chunk<S, 1, false>(p, x, factors, item);
        } else if (p.T == 1) {
            shrink_chunk<S, 1, true>(p, x, factors, item);
        } else if (p.T <= 4) {
            shrink_chunk<S, 4, true>(p, x, factors, item);
        } else {
            shrink_chunk<S, TOKEN_GROUP, true>(p, x, factors, item);
        }
    }
}

// Reduces the partial sums of all tokens to u and the logits, then computes gates and v, all in the block's shared memory.
template <class S>
__device__ __forceinline__ void mix_decode(const DecodeParams& p, unsigned char* smem, const DecodeLayout& at, int columns) {
    const int u_columns = static_cast<int>(p.experts_of_a * p.R), R = static_cast<int>(p.R);
    S* u = reinterpret_cast<S*>(smem + at.u);
    S* v = reinterpret_cast<S*>(smem + at.v);
    float* logits = reinterpret_cast<float*>(smem + at.logits);
    float* gates = reinterpret_cast<float*>(smem + at.gates);
    const int count = static_cast<int>(p.T) * columns;
    for (int first = threadIdx.x; first < count; first += SUMS * DECODE_THREADS) {
        float sums[SUMS] = {};
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
#pragma unroll
            for (int j = 0; j < SUMS; ++j) {
                sums[j] += p.partial[chunk * count + smaller(first + j * DECODE_THREADS, count - 1)];
            }
        }
#pragma unroll
        for (int j = 0; j < SUMS; ++j) {
            const int i = first + j * DECODE_THREADS;
            if (i >= count) break;
            const int64_t t = i / columns, c = i % columns;
            if (blockIdx.x == 0) save_projection<S>(p, t, c, sums[j]);
            if (c < u_columns) {
                u[t * u_columns + c] = from_float<S>(sums[j]);
            } else {
                logits[t * p.E + c - u_columns] = logit_of<S>(p, c - u_columns, sums[j]);
            }
        }
    }
    __syncthreads();
    const Tensor source = p.gate_weight.data != nullptr ? Tensor{logits, true} : p.logits;
    gate_softmax<S>(p, source, 0, gates, p.E, static_cast<int>(p.T));
    for (int i = threadIdx.x; i < static_cast<int>(p.T) * R; i += DECODE_THREADS) {
        const int64_t t = i / R, r = i % R;
        mix<S>(p, gates + t * p.E, u + t * u_columns, v + t * p.E * p.R, r);
    }
    __syncthreads();
}

// Columns [o0, o0 + column_tile) of y: every warp sums over its share of v's columns, then their sums are reduced in order.
template <class S>
__device__ __forceinline__ void expand_tile(const DecodeParams& p, unsigned char* smem, const DecodeLayout& at, int64_t o0) {
    const S* factors = reinterpret_cast<const S*>(smem + at.factors);
    const S* v = reinterpret_cast<const S*>(smem + at.v);
    float* sums = reinterpret_cast<float*>(smem + at.sums);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = static_cast<int>(p.column_tile);
    const int v_columns = static_cast<int>(p.E * p.R);
    for (int64_t t0 = 0; t0 < p.T; t0 += TOKEN_GROUP) {
        const int tokens = static_cast<int>(smaller(TOKEN_GROUP, p.T - t0));
        for (int col = lane; col < width; col += 32) {
            float sum[TOKEN_GROUP] = {};
            for (int er = warp; er < v_columns; er += DECODE_WARPS) {
                const float factor = to_float(factors[er * width + col]);
#pragma unroll
                for (int i = 0; i < TOKEN_GROUP; ++i) {
                    if (i < tokens) sum[i] += to_float(v[(t0 + i) * v_columns + er]) * factor;
                }
            }
#pragma unroll
            for (int i = 0; i < TOKEN_GROUP; ++i) sums[(warp * TOKEN_GROUP + i) * width + col] = sum[i];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * width; i += DECODE_THREADS) {
            const int64_t t = t0 + i / width, o = o0 + i % width;
            if (o >= p.O) continue;
            float sum = 0.f;
            for (int w = 0; w < DECODE_WARPS; ++w) sum += sums[(w * TOKEN_GROUP) * width + i];
            const auto* bases = static_cast<const S*>(p.base.data);
            const float base = bases == nullptr ? 0.f : to_float(bases[t * p.base.stride + o]);
            static_cast<S*>(p.y)[t * p.O + o] = from_float<S>(base + p.scaling * sum);
        }
        __syncthreads();
    }
}

template <class S>
__global__ void __launch_bounds__(DECODE_THREADS, 1) decode_fwd_kernel(DecodeParams p) {
    DYNAMIC_SMEM(smem);
    const DecodeLayout at = DecodeLayout::of(p, sizeof(S));
    const Matrix x = tokens_of<S>(p), a = a_and_gate<S>(p), b = b_of<S>(p);

    auto load_factors = [&](int64_t tile) {
        const int chunks = static_cast<int>(p.column_tile) / VECTOR<S>;
        for (int i = threadIdx.x; i < static_cast<int>(b.rows) * chunks; i += DECODE_THREADS) {
            S* to = reinterpret_cast<S*>(smem + at.factors) + i * VECTOR<S>;
            load_chunk(to, b, i / chunks, tile * p.column_tile + i % chunks * VECTOR<S>, b.rows);
        }
        copy_async_commit();
    };
    load_factors(blockIdx.x);
    shrink_decode<S>(p, x, a);
    grid_barrier();
    mix_decode<S>(p, smem, at, static_cast<int>(a.rows));

    for (int64_t tile = blockIdx.x; tile * p.column_tile < p.O; tile += gridDim.x) {
        if (tile != blockIdx.x) load_factors(tile);
        copy_async_wait<0>();
        __syncthreads();  // all threads see the factors
        expand_tile<S>(p, smem, at, tile * p.column_tile);
    }
    copy_async_wait<0>();  // a block without columns must also wait for its copies
}

}  // namespace lmoe
