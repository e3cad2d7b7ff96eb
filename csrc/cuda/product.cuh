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

// Where the 16-byte copies of one thread lie in a tile. The last 16 rows or columns of 144 are copied by half of the
// threads; all other copies of a thread are in one column, a fixed number of rows apart.
template <class S, int EXTENT, bool K_ALONG_ROW>
struct Share {
    using T = OperandTile<S, EXTENT, K_ALONG_ROW>;
    static constexpr int WHOLE = EXTENT / 64 * 64;  // what all threads copy of the extent
    static constexpr int CHUNKS = K_ALONG_ROW ? T::CHUNKS : WHOLE / VECTOR<S>, ROWS_APART = THREADS / CHUNKS;
    static constexpr int REST_CHUNKS = K_ALONG_ROW ? T::CHUNKS : 16 / VECTOR<S>;  // in a row of the rest
    static constexpr int OF_ALL = (K_ALONG_ROW ? WHOLE : BLOCK_K<S>) / ROWS_APART, COUNT = OF_ALL + (EXTENT > WHOLE ? 1 : 0);
    static_assert(EXTENT == WHOLE || EXTENT == WHOLE + 16, "half of the threads copy the rest");

    static __device__ __forceinline__ bool has(int i) { return i < OF_ALL || threadIdx.x < THREADS / 2; }
    static __device__ __forceinline__ int row(int i) {
        if (i < OF_ALL) return static_cast<int>(threadIdx.x / CHUNKS) + i * ROWS_APART;
        return static_cast<int>(threadIdx.x / REST_CHUNKS) + (K_ALONG_ROW ? WHOLE : 0);
    }
    static __device__ __forceinline__ int column(int i) {
        if (i < OF_ALL) return static_cast<int>(threadIdx.x % CHUNKS) * VECTOR<S>;
        return static_cast<int>(threadIdx.x % REST_CHUNKS) * VECTOR<S> + (K_ALONG_ROW ? 0 : WHOLE);
    }
};

// Whether 16-byte copies bring a matrix to shared memory: its rows are aligned and of the kernel's dtype.
template <class S>
__device__ __forceinline__ bool is_fast(const Matrix& m) {
    const bool first = m.first_aligned && (sizeof(S) == 4 || !m.first_fp32);
    const bool second = m.second == nullptr || (m.second_aligned && (sizeof(S) == 4 || !m.second_fp32));
    return first && second && m.columns % VECTOR<S> == 0;
}

// Brings an operand to shared memory, a tile in every step of a sum. Addresses are made before the loop: made anew for every
// copy they were three quarters of a step's instructions (sm_90, nvcc 13.0, 2026-11). What lies outside the matrix is not
// copied or copied from inside: its products are not stored. Zeros follow the end of the sum.
template <class S, int EXTENT, bool K_ALONG_ROW>
class Copies {
    using At = Share<S, EXTENT, K_ALONG_ROW>;
    static_assert(!K_ALONG_ROW || At::COUNT == At::OF_ALL, "a rest along the rows has no clamped address");
    const Matrix& m_;
    const S *from_, *rest_ = nullptr;  // of a thread's first copy, and that of the rest, in the next step
    int inside_;                       // rows of the product from the first copy's on

public:
    // For rows of the product from `start` on, and for a sum that begins at k.
    __device__ __forceinline__ Copies(const Matrix& m, int64_t start, int64_t k)
        : m_(m), inside_(static_cast<int>(smaller(m.rows - start, EXTENT)) - At::row(0)) {
        auto address = [&](int i) {
            const int64_t c = K_ALONG_ROW ? k + At::column(i) : smaller(start + At::column(i), m.columns - VECTOR<S>);
            return static_cast<const S*>(m.first) + ((K_ALONG_ROW ? start : k) + At::row(i)) * m.stride + c;
        };
        from_ = address(0);
        if (At::COUNT > At::OF_ALL) rest_ = address(At::OF_ALL);
    }
    // Starts the copies of the next step, with `left` elements of the sum to come.
    __device__ __forceinline__ void load(S* shared, int left) {
        const S* from = from_;
        const int mine = left - (K_ALONG_ROW ? At::column(0) : At::row(0));
#pragma unroll
        for (int i = 0; i < At::OF_ALL; ++i) {
            S* to = shared + At::T::at(At::row(i), At::column(i));
            const bool inside = !K_ALONG_ROW || i * At::ROWS_APART < inside_;
            if (inside) copy_async_or_zeros(to, from, (K_ALONG_ROW ? 0 : i * At::ROWS_APART) < mine);
            from += At::ROWS_APART * m_.stride;
        }
        if (At::COUNT > At::OF_ALL && At::has(At::OF_ALL)) {
            S* to = shared + At::T::at(At::row(At::OF_ALL), At::column(At::OF_ALL));
            copy_async_or_zeros(to, rest_, At::row(At::OF_ALL) < left);
        }
        from_ += K_ALONG_ROW ? BLOCK_K<S> : BLOCK_K<S> * m_.stride;
        rest_ += BLOCK_K<S> * m_.stride;
    }
};

// The same for a matrix that may have two buffers. Each copy of a thread has its own address.
template <class S, int EXTENT, bool K_ALONG_ROW>
class CopiesOfTwo {
    using At = Share<S, EXTENT, K_ALONG_ROW>;
    const Matrix& m_;
    int64_t start_;
    int k_;
    const S* from_[At::COUNT];  // of the next step

    __device__ __forceinline__ void point() {
#pragma unroll
        for (int i = 0; i < At::COUNT; ++i) {
            const int64_t r = K_ALONG_ROW ? smaller(start_ + At::row(i), m_.rows - 1) : k_ + At::row(i);
            const int64_t c = K_ALONG_ROW ? k_ + At::column(i) : smaller(start_ + At::column(i), m_.columns - VECTOR<S>);
            const bool second = r >= m_.split;
            from_[i] = static_cast<const S*>(second ? m_.second : m_.first) + (second ? r - m_.split : r) * m_.stride + c;
        }
    }

public:
    __device__ __forceinline__ CopiesOfTwo(const Matrix& m, int64_t start, int64_t k)
        : m_(m), start_(start), k_(static_cast<int>(k)) {
        point();
    }
    // Makes it what its constructor makes.
    __device__ __forceinline__ void restart(int64_t start, int64_t k) {
        start_ = start, k_ = static_cast<int>(k);
        point();
    }
    __device__ __forceinline__ void load(S* shared, int left) {
        if (!K_ALONG_ROW && m_.second != nullptr) point();  // rows of this step may lie in the other buffer
        // the other operand may have more columns than this one has rows
        const int mine = K_ALONG_ROW ? left - At::column(0) : static_cast<int>(smaller(left, m_.rows - k_));
#pragma unroll
        for (int i = 0; i < At::COUNT; ++i) {
            S* to = shared + At::T::at(At::row(i), At::column(i));
            if (At::has(i)) copy_async_or_zeros(to, from_[i], (K_ALONG_ROW ? 0 : At::row(i)) < mine);
            from_[i] += K_ALONG_ROW ? BLOCK_K<S> : BLOCK_K<S> * m_.stride;
        }
        k_ += BLOCK_K<S>;
    }
};

// The same for rows of any alignment, and for fp32 in a product of another dtype.
template <class S, int EXTENT, bool K_ALONG_ROW>
class SlowCopies {
    using At = Share<S, EXTENT, K_ALONG_ROW>;
    const Matrix& m_;
    int64_t start_, k_;

public:
    __device__ __forceinline__ SlowCopies(const Matrix& m, int64_t start, int64_t k) : m_(m), start_(start), k_(k) {}
    __device__ __forceinline__ void restart(int64_t start, int64_t k) { start_ = start, k_ = k; }

    __device__ __forceinline__ void load(S* shared, int left) {
#pragma unroll 1
        for (int i = 0; i < At::COUNT; ++i) {
            const int64_t r = (K_ALONG_ROW ? start_ : k_) + At::row(i), c = (K_ALONG_ROW ? k_ : start_) + At::column(i);
            S* to = shared + At::T::at(At::row(i), At::column(i));
            if (At::has(i)) load_chunk(to, m_, r, c, K_ALONG_ROW ? m_.rows : smaller(k_ + left, m_.rows));
        }
        k_ += BLOCK_K<S>;
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

// A product of 128 x COLS; every warp computes a tile of 32 x COLS / 2. Q may lie in two buffers if QCopies can load them.
template <class S, int COLS, bool P_K_ALONG_ROW, bool Q_K_ALONG_ROW, template <class, int, bool> class QCopies>
struct Product {
    using P = Operand<S, BLOCK_EXTENT, P_K_ALONG_ROW>;
    using Q = Operand<S, COLS, Q_K_ALONG_ROW>;
    static constexpr int WARP_ROWS = BLOCK_EXTENT / ROWS_OF_WARPS, WARP_COLS = COLS / (THREADS / 32 / ROWS_OF_WARPS);
    static constexpr int COLUMNS = COLS, STAGE_BYTES = P::T::BYTES + Q::T::BYTES, SMEM = STAGES * STAGE_BYTES;
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
