"""How the CUDA launchers launch: device, stream, shared memory and errors, as the emulated runtime recorded them."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

from lmoe_kernels import lmoe
from lmoe_kernels.backends.cuda import configs, extension, forward
from tests import plans
from tests.problems import Case, gradients, leaves_of, make_problem
from tests.tensors import off_by_a_byte
from tools.emulator.launches import Calls, current_device, recorded

SECOND = 1  # of the emulated devices; the current one is the first
KERNELS = {  # of a forward on each path, and of its backward
    "decode": {"cooperative"},
    "one pass": {"forward_kernel"},
    "stages": {"mix_fwd_kernel"},
    "parts": {"mix_fwd_kernel", "wgrad_sum_bwd_kernel"},
}
OF_ALL = {"shrink_kernel", "mix_bwd_kernel", "expand_walk_kernel", "wgrad_bwd_kernel"}
MOST = 48 << 10  # bytes of shared memory that CUDA allows a kernel by default
TAKE_MORE = {"cooperative", "forward_kernel", "shrink_kernel", "expand_walk_kernel", "wgrad_bwd_kernel"}


@pytest.fixture(params=KERNELS)
def path(request: pytest.FixtureRequest, emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    plans.force("cuda", request.param, monkeypatch)
    return request.param


def _train(path: str, library: ModuleType) -> Calls:
    """The calls of CUDA in a forward and a backward."""
    T, O = (2, 500) if path == "decode" else (70, 80)  # noqa: E741
    return _calls(Case(T=T, I=72, O=O, E=8, R=16), torch.bfloat16, library)


def _calls(case: Case, dtype: torch.dtype, library: ModuleType) -> Calls:
    problem = make_problem(case, dtype)
    leaves = leaves_of(problem.tensors)
    with recorded(library) as calls:
        gradients(problem, problem.call("cuda", **leaves), leaves)
    return calls


def test_every_kernel_goes_to_the_tensors_device_and_the_callers_stream(path: str, emulated_cuda, monkeypatch) -> None:
    monkeypatch.setattr(extension, "queue", lambda tensor: (SECOND, 0x5EED0))
    calls = _train(path, emulated_cuda)
    assert calls.kernels == KERNELS[path] | OF_ALL
    assert {(launch.device, launch.stream) for launch in calls.launches} == {(SECOND, 0x5EED0)}
    assert current_device(emulated_cuda) == 0, "the caller's device is not restored"


def test_the_attribute_of_a_kernel_is_set_where_it_takes_more_than_48_kb(path: str, emulated_cuda, monkeypatch) -> None:
    """The emulated runtime refuses such a launch on a device where the attribute is not set, as CUDA does."""
    for device in (0, SECOND):
        monkeypatch.setattr(extension, "queue", lambda tensor, device=device: (device, 0))
        more = {launch.kernel for launch in _train(path, emulated_cuda).launches if launch.shared_bytes > MOST}
        assert more == (KERNELS[path] | OF_ALL) & TAKE_MORE


@pytest.mark.parametrize(("dtype", "held"), [(torch.bfloat16, 192), (torch.float32, 96)], ids=str)
def test_a_block_of_expand_holds_a_number_of_coefficients(dtype: torch.dtype, held: int, emulated_cuda, monkeypatch) -> None:
    """Those of v in the forward; in the backward those of du, with a shared A few."""
    plans.force("cuda", "stages", monkeypatch)
    for rank, kernels in ((held // 4, {"expand_walk_kernel"}), (held // 4 + 1, {"expand_kernel", "expand_walk_kernel"})):
        calls = _calls(Case(T=5, I=24, O=40, E=4, R=rank, shared_a=True), dtype, emulated_cuda)
        assert {kernel for kernel in calls.kernels if kernel.startswith("expand")} == kernels


def test_the_device_is_restored_after_an_error(emulated_cuda, monkeypatch) -> None:
    monkeypatch.setattr(extension, "queue", lambda tensor: (SECOND, 0))
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: configs.DecodePlan(1, 256, 1, 48, 4096))
    with pytest.raises(RuntimeError, match="count shared memory differently"):
        make_problem(Case(), torch.bfloat16).call("cuda")
    assert current_device(emulated_cuda) == 0


def test_a_device_that_does_not_exist_is_refused(emulated_cuda, monkeypatch) -> None:
    monkeypatch.setattr(extension, "queue", lambda tensor: (2, 0))
    device = extension.device_of(0)
    monkeypatch.setattr(extension, "device_of", lambda index: device)
    with recorded(emulated_cuda) as calls, pytest.raises(RuntimeError, match="cudaSetDevice: invalid device ordinal"):
        make_problem(Case(), torch.bfloat16).call("cuda")
    assert calls.launches == []


def test_the_queue_is_the_current_stream_of_the_tensors_device(monkeypatch) -> None:
    streams = {0: 0x1000, 3: 0x3000}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    for index, stream in streams.items():
        tensor = SimpleNamespace(device=torch.device("cuda", index))
        assert extension.queue(tensor) == (index, stream)


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "gate_weight", "gate_bias", "gate_logits", "base"])
@pytest.mark.parametrize("tokens", [3, 70], ids=["few tokens", "many tokens"])
def test_an_address_between_two_elements_is_refused(tokens: int, name: str, emulated_cuda) -> None:
    """A view of bytes may start at any address; the error names the tensor, and no kernel runs."""
    tensors = make_problem(
        Case(T=tokens, outside_logits=name == "gate_logits", gate_bias=name == "gate_bias"), torch.bfloat16
    ).tensors
    tensors["base"] = torch.randn(tokens, 41).bfloat16()
    tensors[name] = off_by_a_byte(tensors[name])
    named = "logits" if name == "gate_logits" else name
    with recorded(emulated_cuda) as calls, pytest.raises(ValueError, match=f"lmoe: {named} must lie on a multiple of"):
        lmoe(tensors.pop("x"), tensors.pop("lora_a"), tensors.pop("lora_b"), **tensors, backend="cuda")
    assert calls.launches == []
