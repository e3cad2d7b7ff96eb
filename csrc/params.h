// What Python hands to the launchers: addresses, sizes and options of one call. No torch, no CUDA.
// Letters: T tokens, I in_features, O out_features, E experts, R rank. Rows are contiguous, `*_stride` elements apart.
#pragma once

#include <cstdint>

namespace lmoe {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct ForwardParams {
    Dtype dtype;  // of x, dy, base, u and y
    int64_t T, I, O, E, R;
    int64_t experts_of_a;  // E, or 1 where all experts share one A
    int64_t top_k;         // E: all experts are kept
    bool renormalize;      // the softmax is over the experts kept; else over all, and the gates kept sum to less than one
    float scaling;
    bool factors;  // mixing="factors"; else "outputs"

    const void* x;  // (T, I); null in a backward that needs no gradient over x
    int64_t x_stride;
    const void* lora_a;       // (experts_of_a, R, I)
    const void* lora_b;       // (E, R, O)
    const void* gate_weight;  // (E, I); null where the logits come from an outside router
    bool lora_a_fp32;         // an fp32 parameter beside half-precision tokens, likewise the next two
    bool lora_b_fp32;
    bool gate_weight_fp32;
    bool logits_fp32;  // false only for an outside router's in `dtype`
    const void* base;  // (T, O), or (O) where base_stride is 0; null: nothing to add to
    int64_t base_stride;

    void* logits;    // (T, E); read where gate_weight is null, else written by forward, fp32
    void* u;         // (T, experts_of_a, R); null, and the written logits too, where nobody wants them: never by stages
    void* v;         // (T, v_stride), the first E * R columns; workspace
    float* scratch;  // (T, scratch_stride) fp32: E gates; in the backward then E dgates, R of h, R of dh; workspace
    void* y;         // (T, O)
    int64_t v_stride;
    int64_t scratch_stride;
    float* partial;        // the parts of a sum, fp32, one product's after the other's; workspace, null where none is split
    int64_t shrink_parts;  // x's features (the backward: dy's) are summed in so many parts, and those in a fixed order
    int64_t smem;  // bytes of shared memory of decode, or of a forward in one pass, which has no workspace; 0: by stages
};

// The backward knows all that the forward knows, plus gradients. A null gradient is not computed.
struct BackwardParams : ForwardParams {
    const void* dy;  // (T, O)
    int64_t dy_stride;
    const float* dlogits_in;  // (T, E), or null

    void* dv;  // (T, v_stride), scaling * dy B^T; workspace; null where only lora_b wants a gradient
    void* z;   // (T, z_stride): experts_of_a * R columns du, then E columns dlogits of a gate; workspace; null with dv
    int64_t z_stride;
    int64_t wgrad_splits;  // the tokens are summed in so many parts, and those in a fixed order

    void* dx;            // (T, I)
    void* dlora_a;       // as lora_a
    void* dlora_b;       // as lora_b
    void* dgate_weight;  // as gate_weight
    void* dlogits;       // (T, E), of an outside router, typed as its logits
};

// Rows of contiguous features, in two buffers: the first `split` rows in one, the others in the second.
struct Matrix {
    const void* first;
    const void* second;
    int64_t split;    // rows in `first`
    int64_t rows;     // in both
    int64_t columns;  // features in a row
    int64_t stride;   // elements between rows, in both
    bool first_fp32;  // fp32 elements, to be rounded to the kernel's dtype on load
    bool second_fp32;
    bool first_aligned;  // rows start on 16 bytes: 16-byte loads
    bool second_aligned;
};

struct ShrinkParams {
    Matrix rows;     // (T, F)
    Matrix factors;  // (C, F)
    float* partial;  // (parts, T, C)
    int64_t parts;
    int64_t features_a_part;  // a multiple of the tile's
};

// out = base + scaling * a product
struct Output {
    void* out;         // (T, F)
    const void* base;  // (T, F), (F) where base_stride is 0, or null
    int64_t base_stride;
    int64_t T, F;
    bool vectors;  // rows of out and base start on 16 bytes
    float scaling;
};

struct ExpandParams {
    Matrix coefficients;  // (T, C)
    Matrix factors;       // (C, F)
    Output output;
};

struct WgradParams {
    Matrix coefficients;  // (T, C)
    Matrix rows;          // (T, F)
    void* first;          // (split, F): the gradient of the first `split` coefficients
    void* second;         // (C - split, F)
    int64_t split;
    bool first_fp32, second_fp32;
    float* partial;          // (splits, C, F), or null where splits is 1
    int64_t tokens_a_split;  // a multiple of the tile's
    int64_t splits;
    float scaling;
};

// A forward of few tokens; `partial` is (chunks, T, C), C = experts_of_a * R and, of a gate, E.
struct DecodeParams : ForwardParams {
    int64_t chunk;        // features of x in one partial sum, a multiple of 256
    int64_t chunks;       // ceil(I / chunk), 1 where I is 0
    int64_t column_tile;  // columns of y that a block makes at a time, a multiple of 8
    int blocks;           // not more than run at the same time
};

}  // namespace lmoe
