// SPDX-License-Identifier: Apache-2.0
// Several mixtures of few tokens added to y in place in ONE cooperative launch, made for CUDA graphs: decode.cuh with a
// table of mixtures.
//
// Shrink: one product of x with the rows of all A and all gates. After the barrier of the grid a block goes through its
// tiles of y, and through the mixtures that add to a tile: it mixes one and expands it to the tile. The copies of lora_b and
// y for the first of them start before the barrier. A mixture whose group no token has costs nothing: its rows are not read.
#pragma once

#include "decode.cuh"

namespace lmoe {

// The group of a token; there must be groups.
__device__ __forceinline__ int64_t group_of_token(const StackedParams& p, int64_t t) {
    return p.group_has_64_bits ? static_cast<const int64_t*>(p.token_group)[t] : static_cast<const int*>(p.token_group)[t];
}

// The parameters of one mixture. Its logits lie in shared memory, and nothing is saved.
template <class S>
__host__ __device__ inline DecodeParams params_of(const StackedParams& p, const Mixture& own) {
    DecodeParams q = p;
    q.O = own.O, q.E = own.E, q.R = own.R, q.experts_of_a = own.experts_of_a;
    q.scaling = own.scaling, q.mixing = own.mixing, q.top_k = own.top_k, q.renormalize = own.renormalize;
    const int64_t size = p.gate_bias.fp32 ? 4 : sizeof(S);
    if (p.gate_bias.data != nullptr) q.gate_bias.data = static_cast<unsigned char*>(p.gate_bias.data) + own.expert * size;
    q.u = nullptr, q.logits = {};
    return q;
}

// Bytes of shared memory that the largest mixture takes.
template <class S>
int64_t stacked_bytes(const StackedParams& p) {
    int64_t bytes = 0;
    for (int i = 0; i < p.mixture_count; ++i) {
        const int64_t own = DecodeLayout::of(params_of<S>(p, p.mixtures[i]), sizeof(S)).bytes;
        bytes = own > bytes ? own : bytes;
    }
    return bytes;
}

// The mixtures that some token needs, a bit for each: the same bits in all lanes, and in all blocks. Each lane looks at one
// mixture, and loads the groups of all tokens together.
__device__ __forceinline__ uint32_t used_mixtures(const StackedParams& p) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const bool exists = lane < p.mixture_count;
    bool used = p.token_group == nullptr;
    if (!used) {
        const int64_t own = p.mixtures[exists ? lane : 0].group;
        int64_t groups[DECODE_TOKENS];
#pragma unroll
        for (int t = 0; t < DECODE_TOKENS; ++t) groups[t] = group_of_token(p, smaller(t, p.T - 1));
#pragma unroll
        for (int t = 0; t < DECODE_TOKENS; ++t) used |= groups[t] == own;
    }
    return sum_of(used && exists ? 1u << lane : 0u, 32);
}

// Whether a row of [lora_a; gate_weight] belongs to a mixture that is used. Each lane looks at one mixture.
struct UsedRows {
    int a, a_end, gate, gate_end;  // rows of the lane's mixture; none if it is not used

    __device__ __forceinline__ UsedRows(const StackedParams& p, uint32_t used) {
        const int lane = static_cast<int>(threadIdx.x % 32);
        const Mixture& own = p.mixtures[lane < p.mixture_count ? lane : 0];
        const bool is_used = used >> lane & 1;
        a = own.a, a_end = is_used ? own.a + own.experts_of_a * own.R : a;
        gate = static_cast<int>(p.rows_of_a) + own.expert, gate_end = is_used ? gate + own.E : gate;
    }
    __device__ __forceinline__ bool contain(int row) const {
        return sum_of((row >= a && row < a_end) || (row >= gate && row < gate_end) ? 1 : 0, 32) > 0;
    }
};

// The pairs of a tile of y and a used mixture that adds to it, one after the other: those of one block. All mixtures of a
// tile follow one another, in their order.
struct StackedWork {
    int tile, mixture = 0;
    int first = 0, count = 0;  // columns of y in the tile
    uint32_t left = 0;         // mixtures of the tile that follow

    __device__ __forceinline__ StackedWork() : tile(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

    // Goes to the next pair. False: there is none.
    __device__ __forceinline__ bool next(const StackedParams& p, uint32_t used) {
        while (left == 0) {
            tile += static_cast<int>(gridDim.x);
            if (tile >= p.tiles) return false;
            int i = p.columns_count - 1;
            while (p.columns[i].first_tile > tile) --i;
            const Columns& own = p.columns[i];
            const int begin = (tile - own.first_tile) * static_cast<int>(p.column_tile);
            first = own.first + begin, count = static_cast<int>(smaller(own.count - begin, p.column_tile));
            left = own.mixtures & used;
        }
        mixture = 0;
        while (!(left >> mixture & 1)) ++mixture;
        left &= left - 1;
        return true;
    }
};

// Starts the copies of a mixture's part of lora_b, and of what it is added to.
template <class S>
__device__ __forceinline__ void load_stacked(const StackedParams& p, const StackedWork& work, const DecodeParams& q,
                                             unsigned char* smem, const DecodeLayout& at) {
    const Mixture& own = p.mixtures[work.mixture];
    const S* b = static_cast<const S*>(p.lora_b.data) + own.b + work.first - own.column;
    const S* y = static_cast<const S*>(p.y) + work.first;
    load_columns<S>(q, smem + at.factors, matrix<S>(b, false, q.E * q.R, work.count, q.O), 0);
    load_columns<S>(q, smem + at.base, matrix<S>(y, false, p.T, work.count, p.y_stride), 0);
    copy_async_commit();
}

// Mixes one of the mixtures.
template <class S>
__device__ __forceinline__ void mix_stacked(const StackedParams& p, const Mixture& own, const DecodeParams& q,
                                            unsigned char* smem, const DecodeLayout& at, int rows) {
    const int u_columns = own.experts_of_a * own.R, columns = u_columns + own.E, rows_of_a = static_cast<int>(p.rows_of_a);
    mix_decode<S>(q, smem, at, columns, Tensor{}, [&](int i) {
        const int t = i / columns, c = i % columns, e = own.expert + c - u_columns;
        if (c >= u_columns && p.gate_weight.data == nullptr) return load<S>(p.logits, t * p.logits_stride + e);
        return p.partial[t * rows + (c < u_columns ? own.a + c : rows_of_a + e)];
    });
}

// Adds one mixture to its tokens in a tile of y. The other tokens are not stored: a product with 0 would not be 0 if the
// mixture has a number that is not finite.
template <class S>
__device__ __forceinline__ void expand_stacked(const StackedParams& p, const StackedWork& work, const DecodeParams& q,
                                               unsigned char* smem, const DecodeLayout& at) {
    const int64_t group = p.mixtures[work.mixture].group;
    S* y = static_cast<S*>(p.y) + work.first;
    with_group(p.T, [&](auto tokens) {
        expand_tile<S, decltype(tokens)::value>(q, smem, at, work.count,
                                                [&](int64_t t, int column, const S* before, float sum) {
                                                    if (p.token_group != nullptr && group_of_token(p, t) != group) return;
                                                    const float scale = p.token_scale == nullptr ? 1.f : p.token_scale[t];
                                                    y[t * p.y_stride + column] =
                                                        from_float<S>(to_float(*before) + q.scaling * scale * sum);
                                                });
    });
}

template <class S>
__global__ void __launch_bounds__(DECODE_THREADS, 1) stacked_kernel(StackedParams p) {
    DYNAMIC_SMEM(smem);
    const uint32_t used = used_mixtures(p);
    if (used == 0) return;  // in all blocks, so none waits for another
    const Matrix x = matrix<S>(p.x.data, false, p.T, p.I, p.x.stride);
    const Matrix a = stacked<S>(p.lora_a, p.rows_of_a, p.gate_weight, p.E, p.I);
    const UsedRows rows(p, used);
    StackedWork work;
    bool has_work = work.next(p, used);
    int mixed = -1;
    const DecodeLayout at_first = DecodeLayout::of(params_of<S>(p, p.mixtures[work.mixture]), sizeof(S));
    if (has_work) load_stacked<S>(p, work, params_of<S>(p, p.mixtures[work.mixture]), smem, at_first);
    float* sums = reinterpret_cast<float*>(smem + at_first.sums);
    shrink_decode<S>(p, x, a, sums, [&](int row) { return p.token_group == nullptr || rows.contain(row); });
    grid_barrier();

    while (has_work) {
        const Mixture& own = p.mixtures[work.mixture];
        const DecodeParams q = params_of<S>(p, own);
        const DecodeLayout at = DecodeLayout::of(q, sizeof(S));
        if (mixed != work.mixture) mix_stacked<S>(p, own, q, smem, at, static_cast<int>(a.rows));
        mixed = work.mixture;
        copy_async_wait<0>();
        __syncthreads();  // all threads see the factors, and what they are added to
        expand_stacked<S>(p, work, q, smem, at);
        has_work = work.next(p, used);
        if (!has_work) return;
        const DecodeParams next = params_of<S>(p, p.mixtures[work.mixture]);
        load_stacked<S>(p, work, next, smem, DecodeLayout::of(next, sizeof(S)));
    }
}

}  // namespace lmoe
