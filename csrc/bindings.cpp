// lmoe_kernels._cuda: parameters filled in by Python, and the launchers. No torch: tensors come as addresses, and the caller
// keeps them alive until the launcher has returned.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launchers.h"

namespace py = pybind11;
using namespace lmoe;

namespace {

// A pointer field, seen from Python as an int; 0 is null.
template <class Params, class Class, class T>
void address(Class& cls, const char* name, T* Params::* field) {
    cls.def_property(
        name, [field](const Params& p) { return reinterpret_cast<uintptr_t>(p.*field); },
        [field](Params& p, uintptr_t value) { p.*field = reinterpret_cast<T*>(value); });
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// All of ForwardParams but the workspaces, by position: set one by one, or by name, these fields cost more than all the rest
// of a launch (8 and 4.5 us against 1, pybind11 3.1).
void set_problem(ForwardParams& p, int dtype, int64_t T, int64_t I, int64_t O, int64_t E, int64_t R, int64_t experts_of_a,
                 int64_t top_k, bool renormalize, float scaling, bool factors, uintptr_t x, int64_t x_stride,
                 uintptr_t lora_a, bool lora_a_fp32, uintptr_t lora_b, bool lora_b_fp32, uintptr_t gate_weight,
                 bool gate_weight_fp32, uintptr_t logits, bool logits_fp32, uintptr_t base, int64_t base_stride, uintptr_t u,
                 uintptr_t y) {
    p.dtype = static_cast<Dtype>(dtype);
    p.T = T, p.I = I, p.O = O, p.E = E, p.R = R;
    p.experts_of_a = experts_of_a, p.top_k = top_k, p.renormalize = renormalize;
    p.scaling = scaling, p.factors = factors;
    p.x = pointer(x), p.x_stride = x_stride;
    p.lora_a = pointer(lora_a), p.lora_a_fp32 = lora_a_fp32;
    p.lora_b = pointer(lora_b), p.lora_b_fp32 = lora_b_fp32;
    p.gate_weight = pointer(gate_weight), p.gate_weight_fp32 = gate_weight_fp32;
    p.logits = pointer(logits), p.logits_fp32 = logits_fp32;
    p.base = pointer(base), p.base_stride = base_stride;
    p.u = pointer(u), p.y = pointer(y);
}

void set_workspaces(ForwardParams& p, uintptr_t v, int64_t v_stride, uintptr_t scratch, int64_t scratch_stride,
                    uintptr_t partial, int64_t shrink_parts) {
    p.v = pointer(v), p.v_stride = v_stride;
    p.scratch = static_cast<float*>(pointer(scratch)), p.scratch_stride = scratch_stride;
    p.partial = static_cast<float*>(pointer(partial)), p.shrink_parts = shrink_parts;
}

void set_plan(DecodeParams& p, uintptr_t partial, int blocks, int64_t chunk, int64_t chunks, int64_t column_tile,
              int64_t smem) {
    p.partial = static_cast<float*>(pointer(partial));
    p.blocks = blocks, p.chunk = chunk, p.chunks = chunks, p.column_tile = column_tile, p.smem = smem;
}

template <class Class>
void backward_fields(Class& cls) {
    using P = BackwardParams;
    address<P>(cls, "dy", &P::dy);
    address<P>(cls, "dlogits_in", &P::dlogits_in);
    address<P>(cls, "dv", &P::dv);
    address<P>(cls, "z", &P::z);
    address<P>(cls, "dx", &P::dx);
    address<P>(cls, "dlora_a", &P::dlora_a);
    address<P>(cls, "dlora_b", &P::dlora_b);
    address<P>(cls, "dgate_weight", &P::dgate_weight);
    address<P>(cls, "dlogits", &P::dlogits);
    cls.def_readwrite("dy_stride", &P::dy_stride).def_readwrite("z_stride", &P::z_stride);
    cls.def_readwrite("wgrad_splits", &P::wgrad_splits);
}

// A tensor's elements lie on multiples of their size; an address off by a byte would be read as another number.
void check_address(const char* name, const void* address, bool fp32, Dtype dtype) {
    const uintptr_t size = fp32 || dtype == Dtype::fp32 ? 4 : 2;
    if (reinterpret_cast<uintptr_t>(address) % size != 0) {
        throw std::invalid_argument(std::string("lmoe: ") + name +
                                    " must lie on a multiple of its element's size, got address " +
                                    std::to_string(reinterpret_cast<uintptr_t>(address)));
    }
}

void check_addresses(const ForwardParams& p) {
    check_address("x", p.x, false, p.dtype);
    check_address("lora_a", p.lora_a, p.lora_a_fp32, p.dtype);
    check_address("lora_b", p.lora_b, p.lora_b_fp32, p.dtype);
    check_address("gate_weight", p.gate_weight, p.gate_weight_fp32, p.dtype);
    check_address("base", p.base, false, p.dtype);
    check_address("logits", p.logits, p.logits_fp32, p.dtype);
}

template <class Params>
auto launcher(void (*launch)(const Params&, int, void*)) {
    return [launch](const Params& p, int device, uintptr_t stream) {
        check_addresses(p);
        launch(p, device, reinterpret_cast<void*>(stream));
    };
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Hand-written CUDA kernels of lmoe_kernels; see csrc/.";
    // module_local: the tests load a second build of this module, for the emulator, beside the first
    py::class_<ForwardParams> forward_params(m, "ForwardParams", py::module_local());
    forward_params.def(py::init([] { return ForwardParams{}; }));
    forward_params.def("set_problem", &set_problem).def("set_workspaces", &set_workspaces);
    forward_params.def_readwrite("smem", &ForwardParams::smem);
    py::class_<BackwardParams, ForwardParams> backward_params(m, "BackwardParams", py::module_local());
    backward_params.def(py::init([] { return BackwardParams{}; }));
    backward_fields(backward_params);

    py::class_<DecodeParams, ForwardParams> decode_params(m, "DecodeParams", py::module_local());
    decode_params.def(py::init([] { return DecodeParams{}; }));
    decode_params.def("set_plan", &set_plan);

    auto def = [&m](const char* name, auto function) {
        m.def(name, function, py::arg("params"), py::arg("device"), py::arg("stream"));
    };
    def("forward", launcher(&lmoe::forward));
    def("backward", launcher(&lmoe::backward));
    def("decode", launcher(&lmoe::decode));
    m.def("processors", &lmoe::processors, py::arg("device"));
}
