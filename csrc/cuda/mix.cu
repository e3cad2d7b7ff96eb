// SPDX-License-Identifier: Apache-2.0
// Mix, forward and backward: reduces the partial sums of shrink, then everything that is done token by token.
//
//     gates = softmax(logits);   h[t,r] = sum_e gates[t,e] u[t,e,r];   v[t,e,r] = gates[t,e] h[t,r]
//
//     factors: dh = sum_e gates dv;  dgates = <dv, h> + <dh, u>;  du = gates dh
//     outputs: dgates = <dv, u>;  du = gates dv
//     dlogits = softmax * (dgates - sum_e gates dgates) + dlogits_in          dgates of dropped experts: 0
#include "gates.cuh"

#include "launch.cuh"

namespace lmoe {

constexpr int MIX_T = 4, MIX_THREADS = 128;  // tokens and threads of a block

// store(t, column, sum) for some tokens: reduces the partial sums of a split shrink, in a fixed order.
template <class Store>
__device__ __forceinline__ void sum_parts(const ForwardParams& p, int64_t t0, int tokens, int columns, Store store) {
    for (int i = threadIdx.x; i < tokens * columns; i += MIX_THREADS) {
        float sum = 0.f;
        for (int64_t part = 0; part < p.shrink_parts; ++part) sum += p.partial[(part * p.T + t0) * columns + i];
        store(t0 + i / columns, i % columns, sum);
    }
    __syncthreads();  // the whole block sees what was stored
}

// The gates of some tokens, from the logits in global memory into scratch.
template <class S>
__device__ __forceinline__ void gates_of_tokens(const ForwardParams& p, int64_t t0, int tokens) {
    gate_softmax<S>(p, p.logits, t0 * p.E, p.scratch + t0 * p.scratch_stride, p.scratch_stride, tokens);
}

// v of some tokens, from u and the logits in global memory.
template <class S>
__device__ __forceinline__ void mix_tokens(const ForwardParams& p, int64_t t0, int tokens) {
    const int R = static_cast<int>(p.R);
    gates_of_tokens<S>(p, t0, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += MIX_THREADS) {
        const int64_t t = t0 + i / R;
        const S* u = static_cast<const S*>(p.u) + t * p.experts_of_a * p.R;
        mix<S>(p, p.scratch + t * p.scratch_stride, u, static_cast<S*>(p.v.data) + t * p.v.stride, i % R);
    }
}

// The columns of one token's row of scratch, in fp32.
struct Scratch {
    float *gates, *dgates, *h, *dh;  // (E), (E), (R), (R)

    static __device__ __forceinline__ Scratch of(const BackwardParams& p, int64_t t) {
        float* row = p.scratch + t * p.scratch_stride;
        return {row, row + p.E, row + 2 * p.E, row + 2 * p.E + p.R};
    }
};

// One token's row of the workspace du_dlogits.
template <class S>
__device__ __forceinline__ S* du_dlogits_of(const BackwardParams& p, int64_t t) {
    return static_cast<S*>(p.du_dlogits.data) + t * p.du_dlogits.stride;
}

// One token and one rank: h and dh to scratch, and du.
template <class S>
__device__ __forceinline__ void mix_bwd(const BackwardParams& p, int64_t t, int64_t r, float h, const S* dv) {
    const Scratch s = Scratch::of(p, t);
    S* du = du_dlogits_of<S>(p, t) + r;
    float dh = 0.f;
    for (int64_t e = 0; e < p.E; ++e) dh += s.gates[e] * to_float(dv[e * p.R]);
    s.h[r] = h;
    s.dh[r] = dh;
    const bool factors = p.mixing == Mixing::factors;
    if (p.experts_of_a == 1) {  // a shared A gathers from every expert: under "factors" dh times each gate
        if (factors && !p.renormalize) {
            float sum = 0.f;  // of the gates; it is 1 if they are renormalized
            for (int64_t e = 0; e < p.E; ++e) sum += s.gates[e];
            dh *= sum;
        }
        *du = from_float<S>(dh);
        return;
    }
    for (int64_t e = 0; e < p.E; ++e) du[e * p.R] = from_float<S>(s.gates[e] * (factors ? dh : to_float(dv[e * p.R])));
}

// The gradient of one gate: through B(t) and, under "factors", also through A(t).
template <class S>
__device__ __forceinline__ void gate_bwd(const BackwardParams& p, int64_t t, int64_t e) {
    const Scratch s = Scratch::of(p, t);
    const S* u = static_cast<const S*>(p.u) + (t * p.experts_of_a + (p.experts_of_a == 1 ? 0 : e)) * p.R;
    const S* dv = static_cast<const S*>(p.dv) + t * p.v.stride + e * p.R;
    const bool factors = p.mixing == Mixing::factors;
    float sum = 0.f;
    for (int64_t r = 0; r < p.R; ++r) {
        const float ur = to_float(u[r]);
        sum += to_float(dv[r]) * (factors ? s.h[r] : ur) + (factors ? s.dh[r] * ur : 0.f);
    }
    s.dgates[e] = sum;
}

// The backward of one token's softmax, to du_dlogits or to an outside router's gradient. A softmax over all experts gives
// dropped experts a gradient too. Their softmax is not in `gates`: it follows from the gate of the largest logit, whose
// expert is always kept, and the difference of the logits.
template <class S>
__device__ __forceinline__ void softmax_bwd(const BackwardParams& p, int64_t t) {
    const Scratch s = Scratch::of(p, t);
    S* dlogits = du_dlogits_of<S>(p, t) + p.experts_of_a * p.R;
    auto logit = [&](int64_t e) { return load<S>(p.logits, t * p.E + e); };
    float mean = 0.f, largest = -INFINITY, largest_gate = 0.f;
    for (int64_t e = 0; e < p.E; ++e) mean += s.gates[e] * s.dgates[e];
    for (int64_t e = 0; e < p.E && !p.renormalize; ++e) {
        largest = fmaxf(largest, logit(e));
        largest_gate = fmaxf(largest_gate, s.gates[e]);
    }
    for (int64_t e = 0; e < p.E; ++e) {
        float dlogit = s.gates[e] * (s.dgates[e] - mean);
        if (!p.renormalize && s.gates[e] == 0.f) dlogit = largest_gate * expf(logit(e) - largest) * -mean;
        if (p.dlogits_in != nullptr) dlogit += p.dlogits_in[t * p.E + e];
        if (p.gate_weight.data != nullptr) dlogits[e] = from_float<S>(dlogit);
        if (p.dlogits != nullptr) store<S>(p.dlogits, t * p.E + e, p.logits.fp32, dlogit);
    }
}

// v of some tokens, and du and dlogits from dv; with a null dv only v, which dlora_b needs.
template <class S>
__device__ __forceinline__ void mix_tokens_bwd(const BackwardParams& p, int64_t t0, int tokens) {
    if (p.dv == nullptr) return mix_tokens<S>(p, t0, tokens);
    const int E = static_cast<int>(p.E), R = static_cast<int>(p.R);  // in 32 bits: a 64-bit division is a function call
    gates_of_tokens<S>(p, t0, tokens);
    for (int i = threadIdx.x; i < tokens * R; i += MIX_THREADS) {
        const int64_t t = t0 + i / R, r = i % R;
        const S* u = static_cast<const S*>(p.u) + t * p.experts_of_a * p.R;
        const float h = mix<S>(p, p.scratch + t * p.scratch_stride, u, static_cast<S*>(p.v.data) + t * p.v.stride, r);
        mix_bwd<S>(p, t, r, h, static_cast<const S*>(p.dv) + t * p.v.stride + r);
    }
    __syncthreads();  // all threads see h and dh in scratch
    for (int i = threadIdx.x; i < tokens * E; i += MIX_THREADS) gate_bwd<S>(p, t0 + i / E, i % E);
    __syncthreads();  // all threads see dgates in scratch
    for (int i = threadIdx.x; i < tokens; i += MIX_THREADS) softmax_bwd<S>(p, t0 + i);
}

template <class S>
__device__ __forceinline__ void store_dv(const BackwardParams& p, int64_t t, int64_t column, float value) {
    static_cast<S*>(p.dv)[t * p.v.stride + column] = from_float<S>(p.scaling * value);
}

// A block reduces the partial sums of MIX_T tokens to u and the logits, then computes v.
template <class S>
__global__ void __launch_bounds__(MIX_THREADS) mix_fwd_kernel(ForwardParams p) {
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * MIX_T;
    const int tokens = static_cast<int>(smaller(MIX_T, p.T - t0));
    const int columns = static_cast<int>(p.experts_of_a * p.R + (p.gate_weight.data != nullptr ? p.E : 0));
    sum_parts(p, t0, tokens, columns, [&](int64_t t, int64_t column, float sum) { save_projection<S>(p, t, column, sum); });
    mix_tokens<S>(p, t0, tokens);
}

// A block reduces the partial sums of MIX_T tokens to dv, unless it is null, then computes everything up to du and dlogits.
template <class S>
__global__ void __launch_bounds__(MIX_THREADS) mix_bwd_kernel(BackwardParams p) {
    const int64_t t0 = static_cast<int64_t>(blockIdx.x) * MIX_T;
    const int tokens = static_cast<int>(smaller(MIX_T, p.T - t0));
    if (p.dv != nullptr) {
        sum_parts(p, t0, tokens, static_cast<int>(p.E * p.R),
                  [&](int64_t t, int64_t column, float sum) { store_dv<S>(p, t, column, sum); });
    }
    mix_tokens_bwd<S>(p, t0, tokens);
}

void mix_fwd(const ForwardParams& p, cudaStream_t stream) {
    with_dtype(p.dtype, [&](auto scalar) {
        LAUNCH(mix_fwd_kernel<decltype(scalar)>, dim3(tiles(p.T, MIX_T)), dim3(MIX_THREADS), 0, stream, p);
    });
    check_launch("mix_fwd_kernel");
}

void mix_bwd(const BackwardParams& p, cudaStream_t stream) {
    with_dtype(p.dtype, [&](auto scalar) {
        LAUNCH(mix_bwd_kernel<decltype(scalar)>, dim3(tiles(p.T, MIX_T)), dim3(MIX_THREADS), 0, stream, p);
    });
    check_launch("mix_bwd_kernel");
}

}  // namespace lmoe
