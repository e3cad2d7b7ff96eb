// Forward of few tokens in ONE launch, made for CUDA graphs: the whole grid shrinks, meets, and expands.
//
// Shrink: a warp dots one row of [lora_a; gate_weight] with a chunk of x's features, for all tokens; the sums of the chunks
// go to `partial`, and are added up in a fixed order. Then a barrier of the whole grid. Mix: every block for itself, it is
// little. Expand: a block makes `column_tile` columns of y; its part of lora_b is on the way to shared memory since before
// the barrier. Every weight is read from memory once.
#pragma once

#include "stages.cuh"

namespace lmoe {

constexpr int DECODE_WARPS = 8, DECODE_THREADS = DECODE_WARPS * 32;
constexpr int LANE_FEATURES = 8;  // of a chunk, at a time
constexpr int TOKEN_GROUP = 8;    // tokens whose sums a thread keeps in registers

// A launch takes the next barrier, so that two are on one barrier only with BARRIERS launches between them.
constexpr int BARRIERS = 1 << 14;
static __device__ unsigned barriers[BARRIERS];

// All blocks of the grid meet. The first block adds what the others leave to 2^31: the top bit flips when all have come, and
// the low bits are zero again.
__device__ __forceinline__ void grid_barrier(unsigned* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned before = add_release(barrier, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
        while (((before ^ load_acquire(barrier)) & 0x80000000u) == 0) {
        }
    }
    __syncthreads();
}

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

// partial[chunk, t, c] for one row c of the factors and one chunk of features, by one warp.
template <class S>
__device__ __forceinline__ void shrink_chunk(const DecodeParams& p, const Matrix& x, const Matrix& factors, int item) {
    const int rows = static_cast<int>(factors.rows);  // 32 bits where they do: a 64-bit division is a call
    const int64_t c = item % rows, chunk = item / rows;
    const int64_t first = chunk * p.chunk, last = smaller(first + p.chunk, p.I);
    const int lane = threadIdx.x % 32;
    for (int64_t t0 = 0; t0 < p.T; t0 += TOKEN_GROUP) {
        float sum[TOKEN_GROUP] = {};
        for (int64_t col = first + lane * LANE_FEATURES; col < last; col += 32 * LANE_FEATURES) {
            float weights[LANE_FEATURES];
            Place::of<LANE_FEATURES>(factors, c, col, factors.rows).load<S>(weights);
#pragma unroll
            for (int i = 0; i < TOKEN_GROUP; ++i) {
                if (t0 + i >= p.T) break;
                float features[LANE_FEATURES];
                Place::of<LANE_FEATURES>(x, t0 + i, col, p.T).load<S>(features);
#pragma unroll
                for (int j = 0; j < LANE_FEATURES; ++j) sum[i] += features[j] * weights[j];
            }
        }
#pragma unroll
        for (int i = 0; i < TOKEN_GROUP; ++i) {
#pragma unroll
            for (int flip = 16; flip > 0; flip /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], flip);
            if (lane == i && t0 + i < p.T) p.partial[(chunk * p.T + t0 + i) * factors.rows + c] = sum[i];
        }
    }
}

// u and the logits from the partial sums, then gates and v, all tokens, into the block's shared memory.
template <class S>
__device__ __forceinline__ void mix_decode(const DecodeParams& p, unsigned char* smem, const DecodeLayout& at, int columns) {
    const int rank_rows = static_cast<int>(p.experts_of_a * p.R), R = static_cast<int>(p.R);
    S* u = reinterpret_cast<S*>(smem + at.u);
    S* v = reinterpret_cast<S*>(smem + at.v);
    float* logits = reinterpret_cast<float*>(smem + at.logits);
    float* gates = reinterpret_cast<float*>(smem + at.gates);
    for (int i = threadIdx.x; i < static_cast<int>(p.T) * columns; i += DECODE_THREADS) {
        const int64_t t = i / columns, c = i % columns;
        float sum = 0.f;
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += p.partial[chunk * p.T * columns + i];
        if (c < rank_rows) {
            u[t * rank_rows + c] = from_float<S>(sum);
            if (blockIdx.x == 0 && p.u != nullptr) static_cast<S*>(p.u)[t * rank_rows + c] = from_float<S>(sum);
        } else {
            logits[t * p.E + c - rank_rows] = sum;
            if (blockIdx.x == 0 && p.logits != nullptr) static_cast<float*>(p.logits)[t * p.E + c - rank_rows] = sum;
        }
    }
    __syncthreads();
    for (int64_t t = threadIdx.x; t < p.T; t += DECODE_THREADS) {
        gate_softmax<S>(p, p.gate_weight != nullptr ? logits : p.logits, t * p.E, gates + t * p.E);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < static_cast<int>(p.T) * R; i += DECODE_THREADS) {
        const int64_t t = i / R, r = i % R;
        mix<S>(p, gates + t * p.E, u + t * rank_rows, v + t * p.E * p.R, r);
    }
    __syncthreads();
}

// Columns [o0, o0 + column_tile) of y: every warp sums its share of the rank rows, then the warps' sums in their order.
template <class S>
__device__ __forceinline__ void expand_tile(const DecodeParams& p, unsigned char* smem, const DecodeLayout& at, int64_t o0) {
    const S* factors = reinterpret_cast<const S*>(smem + at.factors);
    const S* v = reinterpret_cast<const S*>(smem + at.v);
    float* sums = reinterpret_cast<float*>(smem + at.sums);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = static_cast<int>(p.column_tile);
    const int rank_rows = static_cast<int>(p.E * p.R);
    for (int64_t t0 = 0; t0 < p.T; t0 += TOKEN_GROUP) {
        const int tokens = static_cast<int>(smaller(TOKEN_GROUP, p.T - t0));
        for (int col = lane; col < width; col += 32) {
            float sum[TOKEN_GROUP] = {};
            for (int er = warp; er < rank_rows; er += DECODE_WARPS) {
                const float factor = to_float(factors[er * width + col]);
#pragma unroll
                for (int i = 0; i < TOKEN_GROUP; ++i) {
                    if (i < tokens) sum[i] += to_float(v[(t0 + i) * rank_rows + er]) * factor;
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
            const float base = p.base == nullptr ? 0.f : to_float(static_cast<const S*>(p.base)[t * p.base_stride + o]);
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
    const int items = static_cast<int>(p.chunks * a.rows), warps = static_cast<int>(gridDim.x) * DECODE_WARPS;
    for (int item = static_cast<int>(blockIdx.x * DECODE_WARPS + threadIdx.x / 32); item < items; item += warps) {
        shrink_chunk<S>(p, x, a, item);
    }
    grid_barrier(barriers + p.barrier);
    mix_decode<S>(p, smem, at, static_cast<int>(a.rows));

    for (int64_t tile = blockIdx.x; tile * p.column_tile < p.O; tile += gridDim.x) {
        if (tile != blockIdx.x) load_factors(tile);
        copy_async_wait<0>();
        __syncthreads();  // the factors are there for all
        expand_tile<S>(p, smem, at, tile * p.column_tile);
    }
    copy_async_wait<0>();  // of a block without columns
}

}  // namespace lmoe
