// SPDX-License-Identifier: Apache-2.0
// Expand with its coefficients in shared memory, and the store of a tile: out = base + scaling * product.
#pragma once

#include "product.cuh"

namespace lmoe {

constexpr int BLOCK_F = 128;  // features of y or dx in a tile

template <class S>
using Expand = Product<S, BLOCK_F, true, false, CopiesOfTwo>;

template <class S>
__host__ __device__ inline Output output(void* out, const void* base, int64_t base_stride, int64_t T, int64_t F,
                                         float scaling) {
    const bool aligned = on_16_bytes(out, F, sizeof(S)) && on_16_bytes(base, base_stride, sizeof(S));
    return {out, base, base_stride, T, F, aligned, scaling};
}

template <class S>
__device__ __forceinline__ Pair<S> sum(Pair<S> base, float scaling, float first, float second) {
    return {from_float<S>(to_float(base.first) + scaling * first), from_float<S>(to_float(base.second) + scaling * second)};
}

template <class S>
__device__ __forceinline__ uint32_t bits(Pair<S> pair) {
    uint32_t result;
    memcpy(&result, &pair, sizeof result);
    return result;
}
// The pair of the lane next to this one.
template <class S>
__device__ __forceinline__ Pair<S> exchange(Pair<S> pair) {
    const uint32_t received = __shfl_xor_sync(~0u, bits(pair), 1);
    memcpy(&pair, &received, sizeof received);
    return pair;
}

// Stores a tile with rows of any alignment, or one that reaches over the last feature.
template <class S>
__device__ __forceinline__ void store_anywhere(const Output& p, const typename Expand<S>::Accumulators& acc, int64_t t0,
                                               int64_t f0) {
    Expand<S>::for_each_accumulator([&](int i, int n, int half, int row, int col) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int64_t t = t0 + row, f = f0 + col + j;
            if (t >= p.T || f >= p.F) return;
            const auto* base = static_cast<const S*>(p.base);
            const float before = base == nullptr ? 0.f : to_float(base[t * p.base_stride + f]);
            static_cast<S*>(p.out)[t * p.F + f] = from_float<S>(before + p.scaling * acc[i][n][half * 2 + j]);
        }
    });
}

// A lane's accumulators are pairs of columns. In fp32 a pair is stored as it is: four lanes write a whole sector of 32
// bytes. In 16 bits two lanes exchange pairs first, so that each has four columns in sequence, and four lanes again write a
// sector.
template <class S, bool HAS_BASE>
__device__ __forceinline__ void store_aligned(const Output& p, const typename Expand<S>::Accumulators& acc, int64_t t0,
                                              int64_t f0) {
    using E = Expand<S>;
    const int column = E::column_of_lane();
    const bool odd = threadIdx.x % 2 == 1;
#pragma unroll
    for (int i = 0; i < E::WARP_ROWS / 8; ++i) {
        const int64_t t = t0 + E::row_of_lane() + i * 8;
        const bool inside = t < p.T;
        S* out = static_cast<S*>(p.out) + t * p.F + f0 + column;
        const S* base = static_cast<const S*>(p.base) + t * p.base_stride + f0 + column;
        Pair<S> before[E::WARP_COLS / 8] = {};
#pragma unroll
        for (int n = 0; n < E::WARP_COLS / 8; ++n) {
            if (HAS_BASE && inside) before[n] = load_pair(base + n * 8);
        }
#pragma unroll
        for (int n = 0; n < E::WARP_COLS / 8; n += 2) {
            Pair<S> left = sum(before[n], p.scaling, acc[i / 2][n][i % 2 * 2], acc[i / 2][n][i % 2 * 2 + 1]);
            Pair<S> right = sum(before[n + 1], p.scaling, acc[i / 2][n + 1][i % 2 * 2], acc[i / 2][n + 1][i % 2 * 2 + 1]);
            if constexpr (sizeof(S) == 4) {
                if (inside) store_pair(out + n * 8, left), store_pair(out + n * 8 + 8, right);
            } else {
                const Pair<S> received = exchange(odd ? left : right);
                if (inside)
                    store_vector(out + n * 8 + (odd ? 6 : 0),
                                 uint2{bits(odd ? received : left), bits(odd ? right : received)});
            }
        }
    }
}

// Stores a tile of products that starts at token t0 and feature f0.
template <class S>
__device__ __forceinline__ void store_tile(const Output& p, const typename Expand<S>::Accumulators& acc, int64_t t0,
                                           int64_t f0) {
    if (p.aligned && f0 + BLOCK_F <= p.F) {
        p.base != nullptr ? store_aligned<S, true>(p, acc, t0, f0) : store_aligned<S, false>(p, acc, t0, f0);
    } else {
        store_anywhere<S>(p, acc, t0, f0);
    }
}

// Coefficients in shared memory times tiles of columns of `factors`, one after the other. While one is stored the copies for
// the next are in flight.
template <class S>
__device__ __forceinline__ void sweep(unsigned char* smem, const S* coefficients, int count, const Matrix& factors,
                                      const Output& out, int64_t t0, int first_tile, int last_tile) {
    using E = Expand<S>;
    S* stages = reinterpret_cast<S*>(smem);
    const bool fast = is_fast<S>(factors);
    const int steps = E::steps_over(count);
    int64_t loaded = static_cast<int64_t>(first_tile) * BLOCK_F, stored = loaded;  // features
    typename E::Accumulators acc = {};
    typename E::FastQ copies(factors, loaded, 0);
    SlowCopies<S, BLOCK_F, false> slow_copies(factors, loaded, 0);
    int load_step = 0, use_step = 0;
    pipeline((last_tile - first_tile) * steps,
             [&](int i) {
                 S* stage = stages + i % STAGES * E::Q::T::ELEMENTS;
                 const int left = count - load_step * BLOCK_K<S>;
                 fast ? copies.load(stage, left) : slow_copies.load(stage, left);
                 if (++load_step < steps) return;
                 load_step = 0, loaded += BLOCK_F;
                 copies.restart(loaded, 0);
                 slow_copies.restart(loaded, 0);
             },
             [&](int i) {
                 const S* stage = stages + i % STAGES * E::Q::T::ELEMENTS;
                 E::multiply(acc, coefficients + use_step * E::P::T::ELEMENTS, stage, count - use_step * BLOCK_K<S>);
                 if (++use_step < steps) return;
                 store_tile<S>(out, acc, t0, stored);
                 E::for_each_accumulator([&](int i, int n, int half, int, int) {
                     acc[i][n][half * 2] = acc[i][n][half * 2 + 1] = 0.f;
                 });
                 use_step = 0, stored += BLOCK_F;
             });
}

}  // namespace lmoe
