// SPDX-License-Identifier: Apache-2.0
// Backward: shrink of dy, the backward of mix, expand into dx, and the weight gradients.
//
//     dv[t,e,r] = scaling * sum_o dy[t,o] lora_b[e,r,o]                                        shrink
//     du, dlogits                                                                              mix
//     dx = [du, dlogits] [lora_a; gate_weight]                                                 expand
//     [dlora_a; dgate_weight] = [du, dlogits]^T x                                              wgrad
//     dlora_b = scaling * v^T dy                                                               wgrad
#include "expand.cuh"

#include "launch.cuh"

namespace lmoe {
namespace {

template <class S>
void backward_of(const BackwardParams& p, cudaStream_t stream) {
    const Matrix dy = matrix<S>(p.dy.data, false, p.T, p.O, p.dy.stride);
    if (p.du_dlogits.data != nullptr) shrink(p.dtype, {dy, b_of<S>(p), p.partial, p.shrink_parts, 0}, stream);
    mix_bwd(p, stream);
    const int64_t du_columns = p.experts_of_a * p.R, dlogits_columns = p.gate_weight.data != nullptr ? p.E : 0;
    const auto* du_dlogits = static_cast<const S*>(p.du_dlogits.data);
    if (p.dx != nullptr) {
        const Matrix both = matrix<S>(du_dlogits, false, p.T, p.du_dlogits.stride, p.du_dlogits.stride);
        expand(p.dtype, {both, a_and_gate<S>(p), output<S>(p.dx, nullptr, 0, p.T, p.I, 1.f), p.expand_groups}, stream);
    }
    WgradParams w = {};
    w.partial = p.partial;
    if (p.dlora_a.data != nullptr || p.dgate_weight.data != nullptr) {
        const int64_t first = p.dlora_a.data != nullptr ? 0 : du_columns;  // only the columns whose gradient is wanted
        const int64_t last = p.dgate_weight.data != nullptr ? du_columns + dlogits_columns : du_columns;
        w.coefficients = matrix<S>(du_dlogits + first, false, p.T, p.du_dlogits.stride - first, p.du_dlogits.stride);
        w.tokens = tokens_of<S>(p);
        w.splits = p.x_splits;
        w.count = last - first, w.split = du_columns - first;
        w.first = p.dlora_a.data, w.first_fp32 = p.dlora_a.fp32;
        w.second = p.dgate_weight.data, w.second_fp32 = p.dgate_weight.fp32;
        w.scaling = 1.f;
        wgrad(p.dtype, w, stream);
    }
    if (p.dlora_b.data != nullptr) {
        w.coefficients = matrix<S>(p.v.data, false, p.T, p.v.stride, p.v.stride);
        w.tokens = dy;
        w.splits = p.dy_splits;
        w.count = w.split = p.E * p.R;
        w.first = p.dlora_b.data, w.first_fp32 = p.dlora_b.fp32;
        w.second = nullptr;
        w.scaling = p.scaling;
        wgrad(p.dtype, w, stream);
    }
}

}  // namespace

void backward(const BackwardParams& p, int device, void* stream) {
    if (p.T == 0) return;
    const DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto scalar) { backward_of<decltype(scalar)>(p, static_cast<cudaStream_t>(stream)); });
}

}  // namespace lmoe
