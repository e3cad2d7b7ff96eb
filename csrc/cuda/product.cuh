// SPDX-License-Identifier: Apache-2.0
// The building block of all kernels: a pipelined tile product, out[i, j] = sum_k P(i, k) Q(j, k), fp32 in registers.
//
// Both operands are matrices of contiguous rows. K_ALONG_ROW says that the sum runs along the rows (an operand of `shrink`);
// otherwise it runs from row to row (`wgrad`, and the factors of `expand`), and ldmatrix transposes while it loads.
// fp32 uses FMA on the same accumulator layout, so the code around the product is the same.
#pragma once

#include "copies.cuh"

namespace lmoe {

constexpr int ROWS_OF_WARPS = 4;  // along the rows of a product; two along its columns

// Blocks that share a processor, and its registers. For compute capability 10.0 and 12.0 nvcc 13.0 needs more registers than
// two blocks leave (2026-11), and fp32 needs two accumulators for each sum.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class S>
constexpr int RESIDENT = 1;
#else
template <class S>
constexpr int RESIDENT = sizeof(S) == 4 ? 1 : 2;
#endif

// How the fragments of an operand are read.
template <class S, int EXTENT, bool K_ALONG_ROW>
struct Operand {
    using T = OperandTile<S, EXTENT, K_ALONG_ROW>;

    // The index of element (i, k) where shared memory holds a whole operand, tile after tile along k.
    static __device__ __forceinline__ int kept_at(int i, int k) {
        return k / BLOCK_K<S> * T::ELEMENTS + (K_ALONG_ROW ? T::at(i, k % BLOCK_K<S>) : T::at(k % BLOCK_K<S>, i));
    }
    // Four 8 x 8 matrices: lanes 8 m ... 8 m + 7 name the rows of matrix m, which is `i` further along the extent and `k`
    // further along the sum.
    static __device__ __forceinline__ void matrices(uint32_t (&r)[4], const S* shared, int i, int k) {
        const int lane = static_cast<int>(threadIdx.x % 8);
        if constexpr (K_ALONG_ROW) {
            load_matrices(r, shared + T::at(i + lane, k));
        } else {
            load_matrices_transposed(r, shared + T::at(k + lane, i));
        }
    }
    static __device__ __forceinline__ float element(const S* shared, int i, int k) {
        return to_float(shared[K_ALONG_ROW ? T::at(i, k) : T::at(k, i)]);
    }
};

// A product of 128 x COLS; every warp computes a tile of 32 x COLS / 2. Q may lie in two buffers if QCopies can load them.
template <class S, int COLS, bool P_K_ALONG_ROW, bool Q_K_ALONG_ROW, template <class, int, bool> class QCopies>
struct Product {
    using P = Operand<S, BLOCK_EXTENT, P_K_ALONG_ROW>;
    using Q = Operand<S, COLS, Q_K_ALONG_ROW>;
    static constexpr int WARP_ROWS = BLOCK_EXTENT / ROWS_OF_WARPS, WARP_COLS = COLS / (THREADS / 32 / ROWS_OF_WARPS);
    static constexpr int STAGE_BYTES = P::T::BYTES + Q::T::BYTES, SMEM = STAGES * STAGE_BYTES;
    using FastP = Copies<S, BLOCK_EXTENT, P_K_ALONG_ROW>;
    using FastQ = QCopies<S, COLS, Q_K_ALONG_ROW>;
    using Accumulators = float[WARP_ROWS / 16][WARP_COLS / 8][4];

    // acc[i, j] += sum over k in [first_k, last_k) of p(p_start + i, k) q(q_start + j, k)
    static __device__ __forceinline__ void run(Accumulators& acc, unsigned char* smem, const Matrix& p, int64_t p_start,
                                               const Matrix& q, int64_t q_start, int64_t first_k, int64_t last_k) {
        const int count = static_cast<int>(last_k - first_k);
        if (is_fast<S>(p) && is_fast<S>(q)) {
            run_with(acc, smem, FastP(p, p_start, first_k), FastQ(q, q_start, first_k), count);
        } else {
            run_with(acc, smem, SlowCopies<S, BLOCK_EXTENT, P_K_ALONG_ROW>(p, p_start, first_k),
                     SlowCopies<S, COLS, Q_K_ALONG_ROW>(q, q_start, first_k), count);
        }
    }
    template <class Left, class Right>
    static __device__ __forceinline__ void run_with(Accumulators& acc, unsigned char* smem, Left left, Right right,
                                                    int count) {
        const int steps = steps_over(count);
        pipeline(
            steps,
            [&](int step) {
                S* stage = reinterpret_cast<S*>(smem + step % STAGES * STAGE_BYTES);
                left.load(stage, count - step * BLOCK_K<S>);
                right.load(stage + P::T::ELEMENTS, count - step * BLOCK_K<S>);
            },
            [&](int step) {
                const S* stage = reinterpret_cast<const S*>(smem + step % STAGES * STAGE_BYTES);
                multiply(acc, stage, stage + P::T::ELEMENTS, count - step * BLOCK_K<S>);
            });
    }

    static __device__ __forceinline__ int steps_over(int64_t count) {
        return count <= 0 ? 0 : static_cast<int>((count + BLOCK_K<S> - 1) / BLOCK_K<S>);
    }

    static __device__ __forceinline__ int tiles_over(int64_t columns) {
        return static_cast<int>((columns + COLS - 1) / COLS);
    }

    // One step: acc [WARP_ROWS, WARP_COLS] += [WARP_ROWS, BLOCK_K] @ [BLOCK_K, WARP_COLS], with `left` elements of the sum
    // to come, behind which the tiles hold zeros.
    static __device__ __forceinline__ void multiply(Accumulators& acc, const S* p, const S* q, int left) {
        const int count = left < BLOCK_K<S> ? left : BLOCK_K<S>;
        if constexpr (sizeof(S) == 4) {
            multiply_with_fma(acc, p, q, count);
        } else {
#pragma unroll 1  // two steps of the tensor cores at a time; more take registers that two blocks on a processor do not have
            for (int k = 0; k < count; k += 32) multiply_with_mma(acc, p, q, k);
        }
    }
    // 32 elements of the sum from first_k on.
    static __device__ __forceinline__ void multiply_with_mma(Accumulators& acc, const S* p, const S* q, int first_k) {
        constexpr int PAIRS = WARP_COLS / 16;
        const int lane = static_cast<int>(threadIdx.x % 32), row = first_row(), col = first_col();
        const int low = lane / 8 % 2 * 8, high = lane / 16 * 8;
        uint32_t last[4];  // the eight columns that make no pair, for all 32 elements
        if constexpr (WARP_COLS % 16 != 0) Q::matrices(last, q, col + PAIRS * 16, first_k + low + 2 * high);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int k = first_k + i * 16;
            uint32_t a[WARP_ROWS / 16][4];
#pragma unroll
            for (int j = 0; j < WARP_ROWS / 16; ++j) P::matrices(a[j], p, row + j * 16 + low, k + high);
#pragma unroll
            for (int n = 0; n < PAIRS; ++n) {
                uint32_t b[4];
                Q::matrices(b, q, col + n * 16 + high, k + low);
#pragma unroll
                for (int j = 0; j < WARP_ROWS / 16; ++j) {
                    mma(S{}, acc[j][2 * n], a[j], b[0], b[1]);
                    mma(S{}, acc[j][2 * n + 1], a[j], b[2], b[3]);
                }
            }
#pragma unroll
            for (int j = 0; j < WARP_ROWS / 16 && WARP_COLS % 16 != 0; ++j) {
                mma(S{}, acc[j][2 * PAIRS], a[j], last[i * 2], last[i * 2 + 1]);
            }
        }
    }
    static __device__ __forceinline__ void multiply_with_fma(Accumulators& acc, const S* p, const S* q, int count) {
        Accumulators part = {};  // sums of this step only: a sum over thousands of products would lose more to rounding
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
            for_each_accumulator([&](int i, int n, int half, int row, int col) {
                const float left = P::element(p, row, k);
                part[i][n][half * 2] += left * Q::element(q, col, k);
                part[i][n][half * 2 + 1] += left * Q::element(q, col + 1, k);
            });
        }
        for_each_accumulator([&](int i, int n, int half, int, int) {
            acc[i][n][half * 2] += part[i][n][half * 2];
            acc[i][n][half * 2 + 1] += part[i][n][half * 2 + 1];
        });
    }

    static __device__ __forceinline__ int first_row() {
        return static_cast<int>(threadIdx.x / 32 % ROWS_OF_WARPS) * WARP_ROWS;
    }
    static __device__ __forceinline__ int first_col() {
        return static_cast<int>(threadIdx.x / 32 / ROWS_OF_WARPS) * WARP_COLS;
    }
    // A lane's accumulators: [i][n][2 half + j] is the tile's element in row row_of_lane() + 16 i + 8 half and column
    // column_of_lane() + 8 n + j.
    static __device__ __forceinline__ int row_of_lane() { return first_row() + static_cast<int>(threadIdx.x % 32 / 4); }
    static __device__ __forceinline__ int column_of_lane() { return first_col() + static_cast<int>(threadIdx.x % 4) * 2; }

    // f(i, n, half, row, col) for the pairs of accumulators [i][n][2 half], [i][n][2 half + 1].
    template <class F>
    static __device__ __forceinline__ void for_each_accumulator(F f) {
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int n = 0; n < WARP_COLS / 8; ++n) {
                    f(i, n, half, row_of_lane() + i * 16 + half * 8, column_of_lane() + n * 8);
                }
            }
        }
    }
    // f(n, j, col) for the columns of a lane's accumulators [...][n][... + j].
    template <class F>
    static __device__ __forceinline__ void for_each_column(F f) {
#pragma unroll
        for (int n = 0; n < WARP_COLS / 8; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) f(n, j, column_of_lane() + n * 8 + j);
        }
    }
};

}  // namespace lmoe
