// SPDX-License-Identifier: Apache-2.0
// Forward of few tokens in ONE cooperative launch, made for CUDA graphs: shrink, a barrier of the grid, mix and expand.
//
// Shrink: a warp computes the dot products of one row of [lora_a; gate_weight] with a chunk of x's features, for all tokens.
// The chunks of a row are the work of one block, which adds their sums in a fixed order and writes one total for each token;
// after the barrier every block reads these totals only. Mix: it is little work, so every block repeats it. Expand: a block
// computes `column_tile` columns of y; the copies of its part of lora_b and of the base to shared memory start before the
// barrier. Every weight is read from global memory once.
#pragma once

#include <type_traits>

#include "gates.cuh"

namespace lmoe {

constexpr int DECODE_WARPS = 8, DECODE_THREADS = DECODE_WARPS * 32;
constexpr int LANE_FEATURES = 8;   // features per lane and vector load
constexpr int DECODE_TOKENS = 16;  // at most
constexpr int TOKEN_GROUP = 8;     // tokens whose sums a thread keeps in registers, at most
constexpr int TOTALS = 4;          // totals that a thread loads at a time

// The tokens that a thread computes at a time. A single token does the work of one, not of a group.
__host__ __device__ inline int group_of(int64_t T) { return T == 1 ? 1 : T <= 4 ? 4 : TOKEN_GROUP; }

// f(the same as a constant)
template <class F>
__device__ __forceinline__ void with_group(int64_t T, F f) {
    switch (group_of(T)) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 4: return f(std::integral_constant<int, 4>{});
        default: return f(std::integral_constant<int, TOKEN_GROUP>{});
    }
}

// Vector loads of a row, and of each of TOKENS tokens, that a lane has in flight. Few tokens are bound by memory latency, so
// this covers nearly a whole chunk, within 128 registers.
template <class S, int TOKENS>
constexpr int BATCH = sizeof(S) * TOKENS > 16 ? 2 : 4;

// Byte offsets in shared memory.
struct DecodeLayout {
    int64_t factors, base, u, v, logits, gates, sums, bytes;

    static __host__ __device__ DecodeLayout of(const DecodeParams& p, int64_t size) {
        auto padded = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
        DecodeLayout at = {};
        at.factors = 0;                                           // (E R, column_tile)
        at.base = at.factors + p.E * p.R * p.column_tile * size;  // (T, column_tile)
        at.u = at.base + p.T * p.column_tile * size;              // (T, experts_of_a R)
        at.v = at.u + padded(p.T * p.experts_of_a * p.R * size);  // (T, E R)
        at.logits = at.v + padded(p.T * p.E * p.R * size);        // (T, E) fp32
        at.gates = at.logits + padded(p.T * p.E * 4);             // (T, E) fp32
        at.sums = at.gates + padded(p.T * p.E * 4);               // of expand: (DECODE_WARPS, group, column_tile) fp32
        at.bytes = at.sums + DECODE_WARPS * group_of(p.T) * p.column_tile * 4;  // of shrink before: (2, DECODE_WARPS, T)
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
// them. With few tokens a barrier of the warp stops the compiler from moving loads down to their uses, as it does for sm_100
// and sm_120; with more tokens it leaves enough of them together, and all at once would take every register.
template <class S, class W, int TOKENS>
__device__ __forceinline__ void dot_vectors(float (&sum)[TOKENS], const W* weights, const S* x, int64_t x_stride, int tokens,
                                            int first, int last) {
    constexpr int STEPS = BATCH<S, TOKENS>, STRIDE = 32 * LANE_FEATURES;
    for (int begin = first; begin < last; begin += STEPS * STRIDE) {  // as often for all lanes
        const int col = begin + threadIdx.x % 32 * LANE_FEATURES;
        Features<W> weight[STEPS];
        Features<S> features[STEPS][TOKENS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int at = static_cast<int>(smaller(col + step * STRIDE, last - LANE_FEATURES));
            weight[step].load(weights + at);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) features[step][i].load(x + smaller(i, tokens - 1) * x_stride + at);
        }
        if constexpr (TOKENS < 8) __syncwarp();
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

// One warp computes sums[t], the dot products of row c of the factors with features [first, last) of all tokens, TOKENS
// tokens at a time.
template <class S, int TOKENS, bool VECTORS>
__device__ __forceinline__ void shrink_chunk(const Matrix& x, const Matrix& factors, int c, int first, int last,
                                             float* sums) {
    const int T = static_cast<int>(x.rows), lane = threadIdx.x % 32;
    for (int t0 = 0; t0 < T; t0 += TOKENS) {
        float sum[TOKENS] = {};
        if constexpr (VECTORS) {
            const Span row = Span::of<LANE_FEATURES>(factors, c, 0, factors.rows);
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
            if (lane == i && t0 + i < T) sums[t0 + i] = sum[i];
        }
    }
}

// partial[t, c], the product of all tokens with all rows of the factors for which is_used(c), shared among the blocks: a
// block computes DECODE_WARPS / chunks rows at a time, one chunk in each warp. All lanes of a warp call is_used with the
// same row.
template <class S, class IsUsed>
__device__ __forceinline__ void shrink_decode(const DecodeParams& p, const Matrix& x, const Matrix& factors, float* sums,
                                              IsUsed is_used) {
    const bool aligned = x.first_aligned && factors.first_aligned && (factors.second == nullptr || factors.second_aligned);
    const int rows = static_cast<int>(factors.rows), T = static_cast<int>(p.T), chunks = static_cast<int>(p.chunks);
    const int warp = static_cast<int>(threadIdx.x) / 32, chunk = warp % chunks, at_once = DECODE_WARPS / chunks;
    const int first = chunk * static_cast<int>(p.chunk), last = static_cast<int>(smaller(first + p.chunk, p.I));
    const int step = static_cast<int>(gridDim.x) * at_once;
    int other = 0;  // rows are added up while some warps already write the sums of the next ones: to the other half
    for (int c0 = static_cast<int>(blockIdx.x) * at_once; c0 < rows; c0 += step, other ^= DECODE_WARPS) {
        const int c = c0 + warp / chunks;
        float* of_warp = sums + (other + warp) * T;
        const bool works = c < rows && is_used(c);
        if (works && aligned && p.I % LANE_FEATURES == 0) {
            with_group(p.T, [&](auto tokens) {
                shrink_chunk<S, decltype(tokens)::value, true>(x, factors, c, first, last, of_warp);
            });
        } else if (works) {
            shrink_chunk<S, 1, false>(x, factors, c, first, last, of_warp);
        }
        __syncthreads();  // all warps see the sums of the chunks
        if (!works || chunk != 0) continue;
        for (int t = static_cast<int>(threadIdx.x) % 32; t < T; t += 32) {
            float total = 0.f;
            for (int i = 0; i < chunks; ++i) total += of_warp[i * T + t];
            p.partial[t * rows + c] = total;
        }
    }
}

// Computes u, the logits, gates and v of all tokens, all in the block's shared memory. total(i) is the total of column
// i % columns of token i / columns: those of u, then those of the logits. A softmax is computed of `source`, the logits here
// if it is null.
template <class S, class Total>
__device__ __forceinline__ void mix_decode(const DecodeParams& p, unsigned char* smem, const DecodeLayout& at, int columns,
                                           Tensor source, Total total) {
    const int u_columns = static_cast<int>(p.experts_of_a * p.R), R = static_cast<int>(p.R);
    S* u = reinterpret_cast<S*>(smem + at.u);
    S* v = reinterpret_cast<S*>(smem + at.v);
    float* logits = reinterpret_cast<float*>(smem + at.logits);
    float* gates = reinterpret_cast<float*>(smem + at.gates);
    const int count = static_cast<int>(p.T) * columns;
    for (int first = threadIdx.x; first < count; first += TOTALS * DECODE_THREADS) {
        float totals[TOTALS];
#pragma unroll
        for (int j = 0; j < TOTALS; ++j) {
            totals[j] = total(static_cast<int>(smaller(first + j * DECODE_THREADS, count - 1)));
        }
#pragma unroll
        for (int j = 0; j < TOTALS; ++j) {
            const int i = first + j * DECODE_THREADS;
            if (i >= count) break;
            const int t = i / columns, c = i % columns;
            if (blockIdx.x == 0) save_projection<S>(p, t, c, totals[j]);
            if (c < u_columns) {
                u[t * u_columns + c] = from_float<S>(totals[j]);
            } else {
                logits[t * p.E + c - u_columns] = logit_of<S>(p, c - u_columns, totals[j]);
            }
        }
    }
    __syncthreads();
    gate_softmax<S>(p, source.data == nullptr ? Tensor{logits, true} : source, 0, gates, static_cast<int>(p.T));
    for (int i = threadIdx.x; i < static_cast<int>(p.T) * R; i += DECODE_THREADS) {
        const int64_t t = i / R, r = i % R;
        mix<S>(p, gates + t * p.E, u + t * u_columns, v + t * p.E * p.R, r);
    }
    __syncthreads();
}

// The first `count` columns of a tile, TOKENS tokens at a time: every warp sums over its share of v's columns, then their
// sums are reduced in order, and store(t, column, &base, sum) is called for each.
template <class S, int TOKENS, class Store>
__device__ __forceinline__ void expand_tile(const DecodeParams& p, unsigned char* smem, const DecodeLayout& at,
                                            int64_t count, Store store) {
    const S* factors = reinterpret_cast<const S*>(smem + at.factors);
    const S* v = reinterpret_cast<const S*>(smem + at.v);
    const S* bases = reinterpret_cast<const S*>(smem + at.base);
    float* sums = reinterpret_cast<float*>(smem + at.sums);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = static_cast<int>(p.column_tile);
    const int v_columns = static_cast<int>(p.E * p.R), T = static_cast<int>(p.T);
    for (int t0 = 0; t0 < T; t0 += TOKENS) {
        const S* of_token[TOKENS];  // the last token's v again where there are fewer: it is not stored
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) of_token[i] = v + smaller(t0 + i, T - 1) * v_columns;
        for (int col = lane; col < width; col += 32) {
            float sum[TOKENS] = {};
#pragma unroll 4
            for (int er = warp; er < v_columns; er += DECODE_WARPS) {
                const float factor = to_float(factors[er * width + col]);
#pragma unroll
                for (int i = 0; i < TOKENS; ++i) sum[i] += to_float(of_token[i][er]) * factor;
            }
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) sums[(warp * TOKENS + i) * width + col] = sum[i];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < static_cast<int>(smaller(TOKENS, T - t0)) * width; i += DECODE_THREADS) {
            const int column = i % width;
            if (column >= count) continue;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; ++w) sum += sums[w * TOKENS * width + i];
            store(t0 + i / width, column, bases + t0 * width + i, sum);
        }
        __syncthreads();
    }
}

// Starts the copies of some columns of all rows of a matrix, a tile of column_tile columns in shared memory.
template <class S>
__device__ __forceinline__ void load_columns(const DecodeParams& p, unsigned char* shared, const Matrix& m, int64_t first) {
    const int chunks = static_cast<int>(p.column_tile) / VECTOR<S>;
    for (int i = threadIdx.x; i < static_cast<int>(m.rows) * chunks; i += DECODE_THREADS) {
        S* to = reinterpret_cast<S*>(shared) + i * VECTOR<S>;
        load_chunk(to, m, i / chunks, first + i % chunks * VECTOR<S>, m.rows);
    }
}

template <class S>
__global__ void __launch_bounds__(DECODE_THREADS, 1) decode_fwd_kernel(DecodeParams p) {
    DYNAMIC_SMEM(smem);
    const DecodeLayout at = DecodeLayout::of(p, sizeof(S));
    const Matrix x = tokens_of<S>(p), a = a_and_gate<S>(p), b = b_of<S>(p);
    const Matrix base = matrix<S>(p.base.data, false, p.base.data == nullptr ? 0 : p.T, p.O, p.base.stride);

    auto load_tile = [&](int64_t tile) {
        load_columns<S>(p, smem + at.factors, b, tile * p.column_tile);
        load_columns<S>(p, smem + at.base, base, tile * p.column_tile);
        copy_async_commit();
    };
    load_tile(blockIdx.x);
    shrink_decode<S>(p, x, a, reinterpret_cast<float*>(smem + at.sums), [](int) { return true; });
    grid_barrier();
    const Tensor source = p.gate_weight.data == nullptr ? p.logits : Tensor{};
    mix_decode<S>(p, smem, at, static_cast<int>(a.rows), source, [&](int i) { return p.partial[i]; });

    for (int64_t tile = blockIdx.x; tile * p.column_tile < p.O; tile += gridDim.x) {
        const int64_t o0 = tile * p.column_tile;
        if (tile != blockIdx.x) load_tile(tile);
        copy_async_wait<0>();
        __syncthreads();  // all threads see the factors and the base
        with_group(p.T, [&](auto tokens) {
            expand_tile<S, decltype(tokens)::value>(p, smem, at, p.O - o0,
                                                    [&](int64_t t, int column, const S* before, float sum) {
                                                        const float start = p.base.data == nullptr ? 0.f : to_float(*before);
                                                        static_cast<S*>(p.y)[t * p.O + o0 + column] =
                                                            from_float<S>(start + p.scaling * sum);
                                                    });
        });
    }
    copy_async_wait<0>();  // a block without columns must also wait for its copies
}

}  // namespace lmoe
