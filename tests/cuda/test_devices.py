"""Devices that offer less, first calls within a capture, and what is asked of CUDA once: on the emulated runtime."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from lmoe_kernels import dispatch
from lmoe_kernels.backends.cuda import availability, configs, extension
from lmoe_kernels.options import Problem, Sizes
from tests import plans
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome
from tools.emulator.launches import Calls, capture, current_device, devices, recorded

FEW, WIDE = Case(T=2, I=72, O=500, E=8, R=16), Case(T=70, I=72, O=80, E=8, R=16)
PROBLEM = Problem(Sizes(2, 64, 64, 2, 4, 2), torch.bfloat16, torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulated devices count as GPUs of a capability that the backend takes."""
    monkeypatch.setattr(extension, "why_not_loaded", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_cpu = dispatch.BACKENDS["cuda"].why_not

    def why_not(problem: Problem) -> str | None:
        return on_cpu(problem) if problem.on_cpu else availability.why_not(problem)

    monkeypatch.setitem(dispatch.BACKENDS, "cuda", dispatch.BACKENDS["cuda"]._replace(why_not=why_not))
    availability._why_not_on.cache_clear()
    yield
    availability._why_not_on.cache_clear()


def _explain() -> str:
    return dispatch.explain_choice("lmoe", PROBLEM, dispatch.AUTO)


def _train(case: Case, library: ModuleType, dtype: torch.dtype = torch.bfloat16) -> Calls:
    """The calls of CUDA in a forward and a backward, whose results are compared."""
    problem = make_problem(case, dtype)
    leaves = leaves_of(problem.tensors)
    with recorded(library) as calls:
        results = outcome(problem, problem.call("cuda", **leaves), leaves)
    assert_all_no_worse(problem, results)
    return calls


def test_the_properties_are_the_devices_own(emulated_cuda) -> None:
    first, second = extension.device_of(0), extension.device_of(1)
    assert second == first._replace(processors=first.processors + 1)  # as runtime.h has it
    assert first[1:] == (163 << 10, True)
    assert current_device(emulated_cuda) == 0


def test_each_device_is_asked_for_its_own_machine_code(unused_cuda) -> None:
    asked = []
    for index in (0, 1, 1):
        with recorded(unused_cuda) as calls:
            extension.device_of(index)
        asked.append(calls.attributes)
    assert asked == [5, 5, 3], "three properties; a kernel's code and its shared memory where they are new"


def test_without_cooperative_launches_few_tokens_go_stage_by_stage(emulated_cuda, gpu, watch) -> None:
    assert "cuda       taken" in _explain()
    with devices(emulated_cuda, cooperative=False):
        assert _train(FEW, emulated_cuda).kernels >= {"shrink_kernel", "mix_fwd_kernel", "expand_walk_kernel"}
        assert "cuda       not taken: few tokens take several launches there: the device has no coop" in _explain()
    assert "cooperative" in _train(FEW, emulated_cuda).kernels


def test_a_device_that_cannot_be_asked_has_one_reason(gpu, monkeypatch) -> None:
    def no_image(index: int) -> None:
        raise RuntimeError("lmoe: CUDA kernels: no kernel image is available for execution on the device")

    monkeypatch.setattr(extension, "device_of", no_image)
    assert "cuda       cannot: the extension cannot run there: lmoe: CUDA kernels: no kernel image" in _explain()


@pytest.mark.parametrize(("kilobytes", "path"), [(100, "forward_kernel"), (90, "shrink_kernel")])
def test_a_device_that_allows_a_block_less_takes_the_next_path(kilobytes: int, path: str, emulated_cuda, gpu, watch) -> None:
    with devices(emulated_cuda, shared_bytes=kilobytes << 10):
        few, many = _train(FEW, emulated_cuda), _train(Case(T=260, I=72, O=80, E=16, R=8), emulated_cuda)
        assert "cooperative" in few.kernels, "a smaller tile of columns fits"
        assert many.kernels & {"forward_kernel", "shrink_kernel"} >= {path}
        assert max(launch.shared_bytes for launch in (*few.launches, *many.launches)) <= kilobytes << 10
        assert "cuda       taken" in _explain()


def test_a_device_that_allows_too_little_takes_the_next_backend(emulated_cuda, gpu) -> None:
    with devices(emulated_cuda, shared_bytes=configs.STAGES_SMEM - 1024):
        needed = f"cannot: it needs {configs.STAGES_SMEM} bytes of shared memory a block"
        assert f"{needed}, the device or its driver allows {configs.STAGES_SMEM - 1024}" in _explain()
        assert dispatch.choose("lmoe", PROBLEM, dispatch.AUTO) != "cuda"


def test_a_driver_that_refuses_the_attribute_takes_the_next_backend(unused_cuda, gpu) -> None:
    with devices(unused_cuda, sets_attributes=False):
        assert extension.device_of(0).shared_memory_a_block == 48 << 10
        assert "the device or its driver allows 49152" in _explain()
        assert dispatch.choose("lmoe", PROBLEM, dispatch.AUTO) != "cuda"
        make_problem(Case(T=2), torch.bfloat16).call("cuda")  # a refusal is not reported again by the next launch


def test_the_largest_kernel_of_the_stages_is_what_must_be_allowed(emulated_cuda, monkeypatch) -> None:
    """Of each dtype with as many coefficients as a block of expand holds: 96 are three steps in fp32, 136 in 16 bits."""
    plans.force("cuda", "stages", monkeypatch)
    calls = [_train(Case(T=70, I=72, O=80, E=8, R=11), emulated_cuda, torch.float32)]
    calls += [_train(WIDE, emulated_cuda, dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert max(launch.shared_bytes for call in calls for launch in call.launches) == configs.STAGES_SMEM


@pytest.mark.parametrize("path", ["decode", "one pass", "stages", "parts"])
def test_the_first_calls_may_be_within_a_capture(path: str, unused_cuda, monkeypatch, watch) -> None:
    """Machine code is loaded then. The emulated runtime refuses that unless the thread's capture mode is relaxed."""
    plans.force("cuda", path, monkeypatch)
    with capture(unused_cuda):
        _train(FEW if path == "decode" else WIDE, unused_cuda)


@pytest.mark.parametrize("path", ["decode", "one pass", "stages", "parts"])
def test_attributes_are_read_and_set_once_on_each_device(path: str, unused_cuda, monkeypatch) -> None:
    plans.force("cuda", path, monkeypatch)
    properties = [extension.device_of(index) for index in (0, 1)]
    monkeypatch.setattr(extension, "device_of", properties.__getitem__)  # the package asks once, too
    case = FEW if path == "decode" else WIDE
    for device in (0, 1):
        monkeypatch.setattr(extension, "queue", lambda tensor, device=device: (device, 0))
        calls = _train(case, unused_cuda)
        assert calls.attributes > len(calls.kernels), "of each kernel one is read; one is set where a kernel takes more"
        assert _train(case, unused_cuda).attributes == 0


def test_stacked_mixtures_in_a_graph_are_left_to_triton(gpu, emulated_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    of_default = [availability.why_not_by_default(PROBLEM._replace(stacked=stacked)) for stacked in (False, True)]
    assert of_default[0] is None
    assert "CUDA graph" in str(of_default[1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert availability.why_not_by_default(PROBLEM._replace(stacked=True)) is None
