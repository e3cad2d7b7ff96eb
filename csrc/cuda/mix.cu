// SPDX-License-Identifier: Apache-2.0
// Mix, forward and backward: reduces the partial sums of shrink, then everything that is done token by token.
//
//     gates = softmax(logits);   h[t,r] = sum_e gates[t,e] u[t,e,r];   v[t,e,r] = gates[t,e] h[t,r]
//
//     factors: dh = sum_e gates dv;  dgates = <dv, h> + <dh, u>;  du = gates dh
//     outputs: dgates = <dv, u>;  du = gates dv
//     dlogits = softmax * (dgates - sum_e gates dgates) + dlogits_in          dgates of dropped experts: 0
//
// Some lanes of a warp compute one token, its team, so that no thread waits for another warp. Each lane first reduces the
// partial sums of some columns. Then some lanes in sequence share the ranks of an expert, and groups of such lanes share the
// experts. Teams are so large that a lane has four vectors of columns: that is enough work for one computation of addresses
// and one softmax, and 8192 tokens of eight experts of rank 16 still are 16 warps a processor (132 processors).
#include "mix.cuh"

#include "launch.cuh"

namespace lmoe {

constexpr int MIX_WARPS = 4;        // of a block, at most; fewer where tokens need much shared memory
constexpr int MIX_RESIDENT = 6;     // blocks that share a processor and its registers
constexpr int MIX_SMEM = 48 << 10;  // bytes of a block: what CUDA allows without an attribute

// A team reduces the partial sums of a token to u and the logits, then computes v.
template <class S, int W, bool KEPT>
__global__ void __launch_bounds__(MIX_WARPS * 32, MIX_RESIDENT) mix_fwd_kernel(Mix<ForwardParams> p) {
    DYNAMIC_SMEM(smem);
    Token<S, W, KEPT, ForwardParams> token(p, smem);
    const bool has_gate = p.gate_weight.data != nullptr;
    const int lane = token.lane, lanes = token.lanes, columns = token.inside ? token.u_columns : 0, step = lanes * W;
    const float* logits = token.partial() + token.u_columns;
    // before u, to be on its way at the same time
    float logit = !has_gate && lane < token.experts ? token.logit(lane) : 0.f;
    PartialSums<1> of_logit(logits + lane, p.part, has_gate && lane < token.experts ? p.shrink_parts : 0);
    auto save = [&](int c, PartialSums<W>& sums) {
        if (c >= columns) return;
        float u[W];
        sums.total(u);
        store_elements(token.u() + c, u);
        if (KEPT) store_elements(token.kept_u + c, u);
    };
    const float* from = token.partial() + lane * W;
#pragma unroll 1
    for (int c = lane * W; c < columns; c += 2 * step, from += 2 * step) {
        PartialSums<W> first(from, p.part, p.shrink_parts),
            second(from + step, p.part, c + step < columns ? p.shrink_parts : 0);
        save(c, first), save(c + step, second);
    }
#pragma unroll 1
    for (int e = lane; e < token.experts; e += lanes) {
        if (has_gate) {
            float sum[1];
            if (e >= lanes) of_logit = PartialSums<1>(logits + e, p.part, p.shrink_parts);
            of_logit.total(sum);
            logit = logit_of<S>(p, e, sum[0]);
            static_cast<float*>(p.logits.data)[token.of_expert(e)] = logit;
        } else if (e >= lanes) {
            logit = token.logit(e);
        }
        if (KEPT) token.gates[e] = logit;
    }
    token.compute_gates();
    token.mix();
}

// A team reduces the partial sums of a token to dv, then computes everything up to du and dlogits; without a place for these
// only v, which dlora_b needs.
template <class S, int W, bool KEPT>
__global__ void __launch_bounds__(MIX_WARPS * 32, MIX_RESIDENT) mix_bwd_kernel(Mix<BackwardParams> p) {
    DYNAMIC_SMEM(smem);
    Token<S, W, KEPT, BackwardParams> token(p, smem);
    const bool wants_du = p.du_dlogits.data != nullptr;
    if (KEPT) {
        const int lane = token.lane, lanes = token.lanes, step = lanes * W;
        const int dv_columns = wants_du && token.inside ? token.E * token.R : 0,
                  u_columns = token.inside ? token.u_columns : 0;
        const float logit = lane < token.experts ? token.logit(lane) : 0.f;  // before dv, to be on its way at the same time
        auto keep_dv = [&](int c, PartialSums<W>& sums) {
            if (c >= dv_columns) return;
            float dv[W];
            sums.total(dv);
            set_product(dv, p.scaling, dv);
            store_elements(token.kept_dv + c, dv);
        };
        const float* from = token.partial() + lane * W;
#pragma unroll 1
        for (int c = lane * W; c < dv_columns || c < u_columns; c += 2 * step, from += 2 * step) {
            PartialSums<W> first(from, p.part, c < dv_columns ? p.shrink_parts : 0);
            PartialSums<W> second(from + step, p.part, c + step < dv_columns ? p.shrink_parts : 0);
            Whole<W, S> first_u, second_u;
            if (c < u_columns) first_u = load_whole<W>(token.u() + c);
            if (c + step < u_columns) second_u = load_whole<W>(token.u() + c + step);
            if (c < u_columns) store_whole<W>(token.kept_u + c, first_u);
            if (c + step < u_columns) store_whole<W>(token.kept_u + c + step, second_u);
            keep_dv(c, first), keep_dv(c + step, second);
        }
#pragma unroll 1
        for (int e = lane; e < token.experts; e += lanes) token.gates[e] = e < lanes ? logit : token.logit(e);
    }
    token.compute_gates();
    if (!wants_du) return token.mix();
    token.mix_bwd();
    __syncwarp();  // all lanes see the gradients of the gates
    token.softmax_bwd();
}

// Whether a lane may load and store four elements together, wherever it does.
bool may_use_vectors(const ForwardParams& p, int64_t columns, const void* du_dlogits) {
    auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    const bool all = aligned(p.partial) && aligned(p.u) && aligned(p.v.data) && aligned(du_dlogits);
    return all && p.R % 4 == 0 && columns % 4 == 0 && p.v.stride % 4 == 0;
}

// launch(p, W, KEPT, grid, block, smem) with the parameters of a launch; W and KEPT have the template arguments as their
// types.
template <class S, class Params, class Launch>
void divide_mix(const Params& params, int64_t columns, bool vectors, Launch launch) {
    auto with_width = [&](auto width) {
        constexpr int W = decltype(width)::value;
        Mix<Params> p = {params, static_cast<int>(columns), params.T * columns, 0, 0, 0, 0};
        while (p.lane_bits < 5 && (1 << p.lane_bits < p.E || 4 * W << p.lane_bits < columns)) ++p.lane_bits;
        while (p.rank_bits < p.lane_bits && W << p.rank_bits < p.R) ++p.rank_bits;
        const int64_t bytes = Token<S, W, true, Params>::bytes(params), of_warp = bytes * (32 >> p.lane_bits);
        const bool kept = 2 * of_warp <= MIX_SMEM;  // with one warp a block too few would hide the latency of memory
        int warps = MIX_WARPS;
        while (kept && warps * of_warp > MIX_SMEM) warps /= 2;
        if (kept) p.smem = static_cast<int>(bytes), p.gates = static_cast<int>(Token<S, W, true, Params>::up(p.E * 4));
        const dim3 grid(tiles(p.T, warps * 32 >> p.lane_bits)), block(warps * 32);
        const int smem = kept ? static_cast<int>(warps * of_warp) : 0;
        if (kept) return launch(p, width, std::true_type{}, grid, block, smem);
        launch(p, width, std::false_type{}, grid, block, smem);
    };
    if (vectors) return with_width(std::integral_constant<int, 4>{});
    with_width(std::integral_constant<int, 1>{});
}

void mix_fwd(const ForwardParams& params, cudaStream_t stream) {
    const int64_t columns = params.experts_of_a * params.R + (params.gate_weight.data != nullptr ? params.E : 0);
    with_dtype(params.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        const bool vectors = may_use_vectors(params, columns, nullptr);
        divide_mix<S>(params, columns, vectors, [&](const auto& p, auto width, auto kept, dim3 grid, dim3 block, int smem) {
            constexpr int W = decltype(width)::value;
            LAUNCH((mix_fwd_kernel<S, W, decltype(kept)::value>), grid, block, smem, stream, p);
        });
    });
    check_launch("mix_fwd_kernel");
}

void mix_bwd(const BackwardParams& params, cudaStream_t stream) {
    const int64_t columns = params.E * params.R;
    with_dtype(params.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        const bool vectors = may_use_vectors(params, columns, params.du_dlogits.data) && params.du_dlogits.stride % 4 == 0;
        divide_mix<S>(params, columns, vectors, [&](const auto& p, auto width, auto kept, dim3 grid, dim3 block, int smem) {
            constexpr int W = decltype(width)::value;
            LAUNCH((mix_bwd_kernel<S, W, decltype(kept)::value>), grid, block, smem, stream, p);
        });
    });
    check_launch("mix_bwd_kernel");
}

}  // namespace lmoe
