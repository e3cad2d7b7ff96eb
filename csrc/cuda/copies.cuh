// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory, the copies that bring them there, and the pipeline of the steps of a sum.
#pragma once

#include "matrix.cuh"

namespace lmoe {

constexpr int THREADS = 256;       // eight warps
constexpr int STAGES = 2;          // tiles of a step in shared memory: one arrives while the other is used
constexpr int BLOCK_EXTENT = 128;  // rows of every product

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
        if (!K_ALONG_ROW && k_ + BLOCK_K<S> > m_.split) point();  // rows of this step lie in the second buffer
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

}  // namespace lmoe
