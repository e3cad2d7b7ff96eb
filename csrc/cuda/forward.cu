// SPDX-License-Identifier: Apache-2.0
// Forward: in one pass where tiles of tokens fill the GPU, otherwise stage by stage.
//
//     u[t,e,r] = sum_i x[t,i] lora_a[e,r,i];   logits[t,e] = sum_i x[t,i] gate_weight[e,i] + gate_bias[e]   shrink
//     gates = softmax(logits);   h[t,r] = sum_e gates[t,e] u[t,e,r];   v[t,e,r] = gates[t,e] h[t,r]   mix
//     y = base + scaling * sum_e,r v[t,e,r] lora_b[e,r,o]                                      expand
#include "expand.cuh"

#include "launch.cuh"

namespace lmoe {
namespace {

template <class S>
void forward_by_stages(const ForwardParams& p, cudaStream_t stream) {
    shrink(p.dtype, {tokens_of<S>(p), a_and_gate<S>(p), p.partial, p.shrink_parts, 0}, stream);
    mix_fwd(p, stream);
    const Matrix v = matrix<S>(p.v.data, false, p.T, p.v.stride, p.v.stride);
    expand(p.dtype, {v, b_of<S>(p), output<S>(p.y, p.base.data, p.base.stride, p.T, p.O, p.scaling), p.expand_groups},
           stream);
}

}  // namespace

void forward(const ForwardParams& p, int device, void* queue) {
    if (p.T == 0) return;
    const DeviceGuard guard(device);
    const auto stream = static_cast<cudaStream_t>(queue);
    switch (p.path) {
        case Path::one_pass: return forward_in_one_pass(p, stream);
        case Path::stages: return with_dtype(p.dtype, [&](auto scalar) { forward_by_stages<decltype(scalar)>(p, stream); });
    }
}

}  // namespace lmoe
