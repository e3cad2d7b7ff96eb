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
void address(Class& cls, const char* name, T* Params::*field) {
    cls.def_property(
        name, [field](const Params& p) { return reinterpret_cast<uintptr_t>(p.*field); },
        [field](Params& p, uintptr_t value) { p.*field = reinterpret_cast<T*>(value); });
}

template <class Class>
void forward_fields(Class& cls) {
    using P = ForwardParams;
    cls.def_readwrite("T", &P::T).def_readwrite("I", &P::I).def_readwrite("O", &P::O);
    cls.def_readwrite("E", &P::E).def_readwrite("R", &P::R);
    cls.def_property(
        "dtype", [](const P& p) { return static_cast<int>(p.dtype); }, [](P& p, int value) { p.dtype = static_cast<Dtype>(value); });
    cls.def_readwrite("experts_of_a", &P::experts_of_a).def_readwrite("top_k", &P::top_k);
    cls.def_readwrite("scaling", &P::scaling).def_readwrite("factors", &P::factors);
    address<P>(cls, "x", &P::x);
    address<P>(cls, "lora_a", &P::lora_a);
    address<P>(cls, "lora_b", &P::lora_b);
    address<P>(cls, "gate_weight", &P::gate_weight);
    address<P>(cls, "base", &P::base);
    address<P>(cls, "logits", &P::logits);
    address<P>(cls, "u", &P::u);
    address<P>(cls, "v", &P::v);
    address<P>(cls, "scratch", &P::scratch);
    address<P>(cls, "y", &P::y);
    cls.def_readwrite("x_stride", &P::x_stride).def_readwrite("base_stride", &P::base_stride);
    cls.def_readwrite("v_stride", &P::v_stride).def_readwrite("scratch_stride", &P::scratch_stride);
    cls.def_readwrite("lora_a_fp32", &P::lora_a_fp32).def_readwrite("lora_b_fp32", &P::lora_b_fp32);
    cls.def_readwrite("gate_weight_fp32", &P::gate_weight_fp32).def_readwrite("logits_fp32", &P::logits_fp32);
}

template <class Class>
void backward_fields(Class& cls) {
    using P = BackwardParams;
    address<P>(cls, "dy", &P::dy);
    address<P>(cls, "dlogits_in", &P::dlogits_in);
    address<P>(cls, "dv", &P::dv);
    address<P>(cls, "z", &P::z);
    address<P>(cls, "partial", &P::partial);
    address<P>(cls, "dx", &P::dx);
    address<P>(cls, "dlora_a", &P::dlora_a);
    address<P>(cls, "dlora_b", &P::dlora_b);
    address<P>(cls, "dgate_weight", &P::dgate_weight);
    address<P>(cls, "dlogits", &P::dlogits);
    cls.def_readwrite("dy_stride", &P::dy_stride).def_readwrite("z_stride", &P::z_stride);
    cls.def_readwrite("wgrad_splits", &P::wgrad_splits);
}

template <class Class>
void decode_fields(Class& cls) {
    using P = DecodeParams;
    address<P>(cls, "partial", &P::partial);
    cls.def_readwrite("chunk", &P::chunk).def_readwrite("chunks", &P::chunks);
    cls.def_readwrite("column_tile", &P::column_tile).def_readwrite("smem", &P::smem).def_readwrite("blocks", &P::blocks);
}

// A tensor's elements lie on multiples of their size; an address off by a byte would be read as another number.
void check_address(const char* name, const void* address, bool fp32, Dtype dtype) {
    const uintptr_t size = fp32 || dtype == Dtype::fp32 ? 4 : 2;
    if (reinterpret_cast<uintptr_t>(address) % size != 0) {
        throw std::invalid_argument(std::string("lmoe: ") + name + " must lie on a multiple of its element's size, got address " +
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

template <class Params, class Argument>
auto launcher(void (*launch)(Argument, int, void*)) {
    return [launch](const Params& p, int device, uintptr_t stream) {
        check_addresses(p);
        launch(p, device, reinterpret_cast<void*>(stream));
    };
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Hand-written CUDA kernels of lmoe_kernels; see csrc/.";
    py::class_<ForwardParams> forward_params(m, "ForwardParams");
    forward_params.def(py::init([] { return ForwardParams{}; }));
    forward_fields(forward_params);
    py::class_<BackwardParams, ForwardParams> backward_params(m, "BackwardParams");
    backward_params.def(py::init([] { return BackwardParams{}; }));
    backward_fields(backward_params);

    py::class_<DecodeParams, ForwardParams> decode_params(m, "DecodeParams");
    decode_params.def(py::init([] { return DecodeParams{}; }));
    decode_fields(decode_params);

    auto def = [&m](const char* name, auto function) {
        m.def(name, function, py::arg("params"), py::arg("device"), py::arg("stream"));
    };
    def("forward", launcher<ForwardParams>(&lmoe::forward));
    def("backward", launcher<BackwardParams>(&lmoe::backward));
    def("decode", launcher<DecodeParams>(&lmoe::decode));
    m.def("processors", &lmoe::processors, py::arg("device"));
}
