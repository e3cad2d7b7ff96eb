// SPDX-License-Identifier: Apache-2.0
// All of a forward in one kernel: a block computes BLOCK_EXTENT tokens from x to y, and everything in between stays in its
// shared memory. u and the logits are also written to global memory if they are saved for the backward.
#include "expand.cuh"
#include "gates.cuh"

#include "launch.cuh"

namespace lmoe {

// Byte offsets in shared memory. Its beginning holds the stages of shrink, then those of expand and v.
template <class S, int COLS>
struct FusedLayout {
    using Shrink = Product<S, COLS, true, true, CopiesOfTwo>;
    using V = typename Expand<S>::P;
    int64_t v, logits, gates, bytes;

    static __host__ __device__ FusedLayout of(int64_t E, int64_t R) {
        FusedLayout at = {};
        at.v = STAGES * Expand<S>::Q::T::BYTES;  // (BLOCK_EXTENT, E R), whole pipeline steps; holds u until mix
        const int64_t end = at.v + (E * R + BLOCK_K<S> - 1) / BLOCK_K<S> * V::T::BYTES;
        at.logits = end > Shrink::SMEM ? end : Shrink::SMEM;  // (BLOCK_EXTENT, E) fp32
        at.gates = at.logits + BLOCK_EXTENT * E * 4;          // (BLOCK_EXTENT, E) fp32
        at.bytes = at.gates + BLOCK_EXTENT * E * 4;
        return at;
    }
};

// Writes u, which lies in v's memory, and a gate's logits to global memory for the backward.
template <class S>
__device__ __forceinline__ void save(const ForwardParams& p, const S* v, const float* logits, int64_t t0, int tokens) {
    using V = typename Expand<S>::P;
    const int columns = static_cast<int>(p.experts_of_a * p.R), lane = static_cast<int>(threadIdx.x % 32);
    S* u = static_cast<S*>(p.u) + t0 * columns;
    for (int row = static_cast<int>(threadIdx.x / 32); row < tokens; row += THREADS / 32) {
        if (columns % VECTOR<S> == 0) {
            for (int c = lane * VECTOR<S>; c < columns; c += 32 * VECTOR<S>) {
                *reinterpret_cast<uint4*>(u + row * columns + c) = *reinterpret_cast<const uint4*>(v + V::kept_at(row, c));
            }
        } else {
            for (int c = lane; c < columns; c += 32) u[row * columns + c] = v[V::kept_at(row, c)];
        }
    }
    if (p.gate_weight.data == nullptr) return;
    float* saved = static_cast<float*>(p.logits.data) + t0 * p.E;
    for (int i = threadIdx.x; i < tokens * static_cast<int>(p.E); i += THREADS) saved[i] = logits[i];
}

// One block on a processor leaves it the registers that both products need together.
template <class S, int COLS>
__global__ void __launch_bounds__(THREADS, 1) forward_kernel(ForwardParams p) {
    DYNAMIC_SMEM(smem);
    using Layout = FusedLayout<S, COLS>;
    using Shrink = typename Layout::Shrink;
    const auto at = Layout::of(p.E, p.R);
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BLOCK_EXTENT;
    const int tokens = static_cast<int>(smaller(BLOCK_EXTENT, p.T - t0)), E = static_cast<int>(p.E),
              R = static_cast<int>(p.R);
    S* v = reinterpret_cast<S*>(smem + at.v);
    float* logits = reinterpret_cast<float*>(smem + at.logits);
    float* gates = reinterpret_cast<float*>(smem + at.gates);
    const Matrix a = a_and_gate<S>(p);
    typename Shrink::Accumulators acc = {};
    Shrink::run(acc, smem, tokens_of<S>(p), t0, a, 0, 0, p.I);
    __syncthreads();  // v overwrites stages

    // expand multiplies whole steps: zeros behind the last column
    for (int i = threadIdx.x; i < static_cast<int>(at.logits - at.v) / 16; i += THREADS) {
        reinterpret_cast<uint4*>(v)[i] = uint4{0, 0, 0, 0};
    }
    __syncthreads();
    const int u_columns = static_cast<int>(p.experts_of_a) * R, columns = static_cast<int>(a.rows);
    Shrink::for_each_column([&](int n, int j, int c) {
        if (c >= columns) return;
#pragma unroll
        for (int i = 0; i < Shrink::WARP_ROWS / 8; ++i) {
            const int row = Shrink::row_of_lane() + i * 8;
            const float value = acc[i / 2][n][i % 2 * 2 + j];
            if (c < u_columns) {
                v[Layout::V::kept_at(row, c)] = from_float<S>(value);
            } else {
                logits[row * E + c - u_columns] = logit_of<S>(p, c - u_columns, value);
            }
        }
    });
    __syncthreads();  // all threads see u and the logits
    if (p.u != nullptr) save<S>(p, v, logits, t0, tokens);
    const bool has_gate = p.gate_weight.data != nullptr;
    gate_softmax<S>(p, has_gate ? Tensor{logits, true} : p.logits, has_gate ? 0 : t0 * E, gates, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += THREADS) {
        const int row = i / R;
        mix<S>(p, gates + row * E, v, v, i % R,
               [row](int64_t column) { return Layout::V::kept_at(row, static_cast<int>(column)); });
    }
    // v needs no barrier here: the sweep has one before its first read of v
    const Output y = output<S>(p.y, p.base.data, p.base.stride, p.T, p.O, p.scaling);
    sweep<S>(smem, v, E * R, b_of<S>(p), y, t0, 0, Expand<S>::tiles_over(p.O));
}

void forward_in_one_pass(const ForwardParams& p, cudaStream_t stream) {
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        with_columns(a_and_gate<S>(p).rows, [&](auto columns) {
            constexpr int COLS = decltype(columns)::value;
            if (a_and_gate<S>(p).rows > COLS || FusedLayout<S, COLS>::of(p.E, p.R).bytes != p.smem) {
                throw std::logic_error(
                    "lmoe: forward_kernel: configs.py and fused.cu count columns or shared memory differently");
            }
            const int smem = static_cast<int>(p.smem);
            LAUNCH((forward_kernel<S, COLS>), dim3(tiles(p.T, BLOCK_EXTENT)), dim3(THREADS), smem, stream, p);
        });
    });
    check_launch("forward_kernel");
}

}  // namespace lmoe
