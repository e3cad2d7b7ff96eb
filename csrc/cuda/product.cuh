// SPDX-License-Identifier: Apache-2.0
// The building block of all kernels: a pipelined tile product, out[i, j] = sum_k P(i, k) Q(j, k), fp32 in registers.
//
// Both operands are matrices of contiguous rows. K_ALONG_ROW says that the sum runs along the rows (an operand of `shrink`);
// otherwise it runs from row to row (`wgrad`, and the factors of `expand`), and ldmatrix transposes while it loads.
// fp32 uses FMA on the same accumulator layout, so the code around the product is the same.
#pragma once

#include "matrix.cuh"

namespace lmoe {

constexpr int THREADS = 256;       // eight warps
constexpr int ROWS_OF_WARPS = 4;   // along the rows of a product; two along its columns
constexpr int STAGES = 2;          // tiles of a step in shared memory: one arrives while the other is used
constexpr int BLOCK_EXTENT = 128;  // rows of every product

// Blocks that share a processor, and its registers. For compute capability 10.0 and 12.0 nvcc 13.0 needs more registers than
// two blocks leave (2026-11), and fp32 needs two accumulators for each sum.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class S>
constexpr int RESIDENT = 1;
#else
template <class S>
constexpr int RESIDENT = sizeof(S) == 4 ? 1 : 2;
#endif

template <class S>
constexpr int BLOCK_K = 128 / sizeof(S);  // elements of the sum in one pipeline step: 128 bytes of a row, a whole L2 line

// A tile of ROWS x COLS elements in shared memory. Every row is followed by 16 bytes that nothing uses, so that the eight
// rows which ldmatrix reads together lie in different banks.
template <class S, int ROWS, int COLS>
struct Tile {
    static constexpr int CHUNKS = COLS / VECTOR<S>, COUNT = ROWS * CHUNKS;  // of 16 bytes: in a row, in all
    static constexpr int STRIDE = COLS + VECTOR<S>, ELEMENTS = ROWS * STRIDE;
    static constexpr int BYTES = ELEMENTS * static_cast<int>(sizeof(S));
    static_assert(CHUNKS % 2 == 0, "with the unused one the number of chunks must be odd");

    static __device__ __forceinline__ int at(int row, int col) { return row * STRIDE + col; }
};

// The tiles of an operand with EXTENT rows of the product.
template <class S, int EXTENT, bool K_ALONG_ROW>
using OperandTile = Tile<S, K_ALONG_ROW ? EXTENT : BLOCK_K<S>, K_ALONG_ROW ? BLOCK_K<S> : EXTENT>;

// The 16-byte copies by which one thread brings its share of an operand to shared memory, a tile in every step of a sum.
// Addresses are not made anew for every copy, which took three quarters of a step's instructions (sm_90, nvcc 13.0,
// 2026-11): the copies of a thread are a fixed number of rows apart. The last 16 rows or columns of 144 are copied by half
// of the threads. IN_TWO_BUFFERS says that the matrix may have a second one.
template <class S, int EXTENT, bool K_ALONG_ROW, bool IN_TWO_BUFFERS>
class Copies {
    using T = OperandTile<S, EXTENT, K_ALONG_ROW>;
    static constexpr int STEP = BLOCK_K<S>, WHOLE = EXTENT / 64 * 64;  // what all threads copy of the extent
    static constexpr int CHUNKS = K_ALONG_ROW ? T::CHUNKS : WHOLE / VECTOR<S>, ROWS_APART = THREADS / CHUNKS;
    static constexpr int COUNT = (K_ALONG_ROW ? WHOLE : STEP) / ROWS_APART;
    static constexpr int REST_CHUNKS = K_ALONG_ROW ? T::CHUNKS : 16 / VECTOR<S>;  // in a row of the rest
    static constexpr int64_t SIZE = sizeof(S);
    static_assert(EXTENT == WHOLE || EXTENT == WHOLE + 16, "half of the threads copy the rest");

public:
    // The copies for rows of the product from `start` on and for sums over [k, last_k).
    __device__ __forceinline__ Copies(const Matrix& m, int64_t start, int64_t k, int64_t last_k)
        : m_(m),
          start_(start),
          k_(k),
          last_k_(K_ALONG_ROW ? last_k : smaller(last_k, m.rows)),
          fast_(is_fast(m)),
          to_(T::at(row(), column())) {
        if (fast_) point();
        if (!IN_TWO_BUFFERS || m.second == nullptr) return;
        jump_ = static_cast<const char*>(m.second) - static_cast<const char*>(m.first) - m.split * m.stride * SIZE;
    }

    // Starts a new sum from the matrix's first row on, for rows of the product from `start` on.
    __device__ __forceinline__ void restart(int64_t start) {
        start_ = start, k_ = 0;
        if (fast_) point();
    }

    // Starts the copies of the next step.
    __device__ __forceinline__ void load(S* shared) {
        if (fast_) {
            load_fast(shared);
        } else {
            load_slowly(shared);
        }
        k_ += STEP;
    }

private:
    const Matrix& m_;
    int64_t start_, k_;
    const int64_t last_k_;
    const bool fast_;
    const int to_;                                  // where the first copy of a thread goes
    const char *from_ = nullptr, *rest_ = nullptr;  // where it, and that of the rest, come from in the next step
    int inside_ = 0,
        in_first_ = 0;  // how many of the thread's copies are inside the matrix, and how many in its first buffer
    int64_t jump_ = 0;  // bytes to add to an address in the first buffer for the same row in the second

    static __device__ __forceinline__ bool is_fast(const Matrix& m) {
        const bool first = m.first_aligned && (sizeof(S) == 4 || !m.first_fp32);
        const bool second =
            !IN_TWO_BUFFERS || m.second == nullptr || (m.second_aligned && (sizeof(S) == 4 || !m.second_fp32));
        return first && second && m.columns % VECTOR<S> == 0;
    }
    // Where the first copy lies in the tile; where that of the rest lies.
    static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x / CHUNKS); }
    static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x % CHUNKS) * VECTOR<S>; }
    static __device__ __forceinline__ int rest_row() {
        return static_cast<int>(threadIdx.x / REST_CHUNKS) + (K_ALONG_ROW ? WHOLE : 0);
    }
    static __device__ __forceinline__ int rest_column() {
        return static_cast<int>(threadIdx.x % REST_CHUNKS) * VECTOR<S> + (K_ALONG_ROW ? 0 : WHOLE);
    }
    static __device__ __forceinline__ bool copies_rest() { return EXTENT != WHOLE && threadIdx.x < THREADS / 2; }

    // How many of a thread's copies, from the matrix's row r on, come before the row `end`.
    static __device__ __forceinline__ int before(int64_t end, int64_t r) {
        const int64_t rows = smaller(end - r, COUNT * ROWS_APART);
        return rows <= 0 ? 0 : static_cast<int>(rows + ROWS_APART - 1) / ROWS_APART;
    }
    // The address of the next step's element in a row and column of the tile; the nearest one inside the matrix.
    __device__ __forceinline__ const char* address(int row, int column) const {
        const int64_t r = K_ALONG_ROW ? smaller(start_ + row, m_.rows - 1) : k_ + row;
        const int64_t c = K_ALONG_ROW ? k_ + column : smaller(start_ + column, m_.columns - VECTOR<S>);
        const bool second = IN_TWO_BUFFERS && r >= m_.split;
        const auto* data = static_cast<const char*>(second ? m_.second : m_.first);
        return data + ((second ? r - m_.split : r) * m_.stride + c) * SIZE;
    }
    __device__ __forceinline__ void point() {
        const int64_t r = (K_ALONG_ROW ? start_ : k_) + row();
        inside_ = K_ALONG_ROW ? before(m_.rows, r) : COUNT;
        in_first_ = IN_TWO_BUFFERS && r < m_.split ? before(m_.split, r) : COUNT;
        from_ = address(row(), column());
        if (copies_rest()) rest_ = address(rest_row(), rest_column());
    }
    __device__ __forceinline__ void load_fast(S* shared) {
        if (IN_TWO_BUFFERS && !K_ALONG_ROW && k_ - STEP < m_.split && k_ + STEP > m_.split) point();
        const int left = static_cast<int>(smaller(last_k_ - k_, STEP)) - (K_ALONG_ROW ? column() : row());
        const int64_t rows_apart = ROWS_APART * m_.stride * SIZE, next_step = (K_ALONG_ROW ? STEP : STEP * m_.stride) * SIZE;
        const char* from = from_;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (IN_TWO_BUFFERS && i == in_first_) from += jump_;
            S* to = shared + to_ + i * ROWS_APART * T::STRIDE;
            if (i < inside_) copy_async_or_zeros(to, from, (K_ALONG_ROW ? 0 : i * ROWS_APART) < left);
            from += rows_apart;
        }
        from_ += next_step;
        if (!copies_rest()) return;
        const int rest_left = K_ALONG_ROW ? left : left + row() - rest_row();
        copy_async_or_zeros(shared + T::at(rest_row(), rest_column()), rest_, rest_left > 0);
        rest_ += next_step;
    }
    // A step of a matrix whose rows are not aligned, or of fp32 in a product of another dtype.
    __device__ __forceinline__ void load_slowly(S* shared) {
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < T::COUNT; i += THREADS) {
            const int row = i / T::CHUNKS, column = i % T::CHUNKS * VECTOR<S>;
            const int64_t r = (K_ALONG_ROW ? start_ : k_) + row, c = (K_ALONG_ROW ? k_ : start_) + column;
            load_chunk(shared + T::at(row, column), m_, r, c, K_ALONG_ROW ? m_.rows : last_k_);
        }
    }
};

// The steps of a sum: load(step) starts the copies that use(step) reads, STAGES - 1 steps ahead.
template <class Load, class Use>
__device__ __forceinline__ void pipeline(int steps, Load load, Use use) {
#pragma unroll 1
    for (int step = 1 - STAGES; step < steps; ++step) {
        if (step >= 0) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // all threads see this step's tiles, and no thread still reads the last step's
        }
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        copy_async_commit();  // also an empty group, so that the count in the wait is right until the last step
        if (step >= 0) use(step);
    }
    copy_async_wait<0>();
}

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

// A product of 128 x COLS; every warp computes a tile of 32 x COLS / 2.
template <class S, int COLS, bool P_K_ALONG_ROW, bool Q_K_ALONG_ROW>
struct Product {
    using P = Operand<S, BLOCK_EXTENT, P_K_ALONG_ROW>;
    using Q = Operand<S, COLS, Q_K_ALONG_ROW>;
    static constexpr int WARP_ROWS = BLOCK_EXTENT / ROWS_OF_WARPS, WARP_COLS = COLS / (THREADS / 32 / ROWS_OF_WARPS);
    static constexpr int COLUMNS = COLS, STAGE_BYTES = P::T::BYTES + Q::T::BYTES, SMEM = STAGES * STAGE_BYTES;
    using Accumulators = float[WARP_ROWS / 16][WARP_COLS / 8][4];

    // acc[i, j] += sum over k in [first_k, last_k) of p(p_start + i, k) q(q_start + j, k)
    static __device__ __forceinline__ void run(Accumulators& acc, unsigned char* smem, const Matrix& p, int64_t p_start,
                                               const Matrix& q, int64_t q_start, int64_t first_k, int64_t last_k) {
        Copies<S, BLOCK_EXTENT, P_K_ALONG_ROW, false> left(p, p_start, first_k, last_k);
        Copies<S, COLS, Q_K_ALONG_ROW, true> right(q, q_start, first_k, last_k);
        const int steps = steps_over(last_k - first_k);
        const int of_last_step = static_cast<int>(last_k - first_k) - (steps - 1) * BLOCK_K<S>;
        pipeline(
            steps,
            [&](int step) {
                S* stage = reinterpret_cast<S*>(smem + step % STAGES * STAGE_BYTES);
                left.load(stage);
                right.load(stage + P::T::ELEMENTS);
            },
            [&](int step) {
                const S* stage = reinterpret_cast<const S*>(smem + step % STAGES * STAGE_BYTES);
                multiply(acc, stage, stage + P::T::ELEMENTS, step + 1 < steps ? BLOCK_K<S> : of_last_step);
            });
    }

    static __device__ __forceinline__ int steps_over(int64_t count) {
        return count <= 0 ? 0 : static_cast<int>((count + BLOCK_K<S> - 1) / BLOCK_K<S>);
    }

    // acc [WARP_ROWS, WARP_COLS] += [WARP_ROWS, count] @ [count, WARP_COLS], with zeros in memory behind the `count`
    // elements.
    static __device__ __forceinline__ void multiply(Accumulators& acc, const S* p, const S* q, int count) {
        if constexpr (sizeof(S) == 4) {
            multiply_with_fma(acc, p, q, count);
        } else if (count == BLOCK_K<S>) {
            multiply_with_mma<BLOCK_K<S>>(acc, p, q, 0);
        } else {
#pragma unroll 1
            for (int k = 0; k < count; k += 32) multiply_with_mma<32>(acc, p, q, k);
        }
    }
    template <int COUNT>
    static __device__ __forceinline__ void multiply_with_mma(Accumulators& acc, const S* p, const S* q, int first_k) {
        constexpr int PAIRS = WARP_COLS / 16;
        const int lane = static_cast<int>(threadIdx.x % 32), row = first_row(), col = first_col();
        const int low = lane / 8 % 2 * 8, high = lane / 16 * 8;
        uint32_t last[4];  // the eight columns that make no pair, for two steps of k
#pragma unroll
        for (int i = 0; i < COUNT; i += 16) {
            const int k = first_k + i;
            uint32_t a[WARP_ROWS / 16][4], b[PAIRS][4];
#pragma unroll
            for (int j = 0; j < WARP_ROWS / 16; ++j) P::matrices(a[j], p, row + j * 16 + low, k + high);
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) Q::matrices(b[j], q, col + j * 16 + high, k + low);
            if (WARP_COLS % 16 != 0 && i % 32 == 0) Q::matrices(last, q, col + PAIRS * 16, k + low + 2 * high);
#pragma unroll
            for (int j = 0; j < WARP_ROWS / 16; ++j) {
#pragma unroll
                for (int n = 0; n < PAIRS * 2; ++n) mma(S{}, acc[j][n], a[j], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                if constexpr (WARP_COLS % 16 != 0) {
                    mma(S{}, acc[j][PAIRS * 2], a[j], last[i % 32 / 8], last[i % 32 / 8 + 1]);
                }
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
    // f(i, n, half, row, col): accumulators [i][n][2 half] and [2 half + 1] are the tile's (row, col) and (row, col + 1).
    template <class F>
    static __device__ __forceinline__ void for_each_accumulator(F f) {
        const int lane = static_cast<int>(threadIdx.x % 32), row = first_row() + lane / 4, col = first_col() + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int n = 0; n < WARP_COLS / 8; ++n) f(i, n, half, row + i * 16 + half * 8, col + n * 8);
            }
        }
    }
};

}  // namespace lmoe
