"""How the Triton kernels are launched: on the tensors' device, with the machine code that Triton would choose, and without
writing results that are not needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lmoe_kernels import lmoe
from lmoe_kernels.backends.triton import host
from tests import plans
from tests.problems import Case, Problem, gradients, leaves_of, make_problem
from tests.triton.compiling import run_compiled
from tools.interpreter.bytes import counted, stored_to

PLANS = [plan for backend, plan in plans.PLANS if backend == "triton"]


KINDS = """
from tests.triton import launching
print(*launching.every_kind(), sep="\\n")
"""
WHOLE_CALLS = """
import sys
from tests.triton import launching
print(launching.whole_calls(int(sys.argv[1])))
"""
HOOKS = """
import torch
from triton import knobs
from lmoe_kernels import lmoe
from tools.stubbed_gpu import stubbed_gpu

tensors, gate = (torch.randn(2, 16), torch.randn(2, 4, 16), torch.randn(2, 4, 16)), torch.randn(2, 16)
seen = []
with stubbed_gpu() as gpu:
    def call():
        seen.clear()
        before = gpu.launches()
        lmoe(*tensors, gate_weight=gate, backend="triton")
        print(gpu.launches() - before, *seen)
    call()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook = lambda data: seen.append(data.get()["name"])
        chain.add(hook)
        call()
        chain.remove(hook)
    call()
"""
EARLY = """
from unittest import mock
import torch
from lmoe_kernels import lmoe
from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.plans import Chip
from tests.triton import launching
from tools.stubbed_gpu import H100, stubbed_gpu

def make(*shape):
    return torch.randn(shape, requires_grad=True)

def call(gpu):
    for _ in range(2):  # the second time with kept code
        before = gpu.launches(), gpu.early_launches()
        y = lmoe(make(2, 16), make(2, 4, 16), make(2, 4, 16), gate_weight=make(2, 16), backend="triton")
        y.backward(torch.ones_like(y))
        print(*(now - then for now, then in zip((gpu.launches(), gpu.early_launches()), before)))

with stubbed_gpu(H100) as gpu:
    call(gpu)
    print("launch_pdl" in host.launch_options(launching.kernel, launching.TILE))
with stubbed_gpu(H100) as gpu, mock.patch.object(host, "_driver_version", return_value=12020):
    call(gpu)
with stubbed_gpu(Chip("sm_89", 128, 99 << 10)) as gpu:
    call(gpu)
"""


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    plans.force("triton", request.param, monkeypatch)
    return request.param


def _problem() -> Problem:
    return make_problem(Case(T=35, I=136, O=130, E=5, R=3, top_k=2), torch.float32)


def test_the_current_device_is_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda", 0)]

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1].index)
    rows = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), get_device=lambda: 1)
    with host.on_device_of(rows):
        assert current[-1] == rows.device
        with host.on_device_of(rows):
            assert len(current) == 2, "it is the current one already"
    assert current == [torch.device("cuda", 0)]
    with host.on_device_of(torch.empty(1)):
        assert current == [torch.device("cuda", 0)], "no tensor on a GPU, no change"


def test_every_kernel_is_launched_on_the_device_of_the_rows(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, within, launched = _problem(), [], []

    @contextmanager
    def device_of(rows: Tensor) -> Iterator[None]:
        within.append(tuple(rows.shape))
        yield
        within.pop()

    def checked(kernel, *args, launch=host.launch, **constants) -> None:
        assert within, f"{kernel.fn.__name__} is launched on whatever device is current"
        launched.append((kernel.fn.__name__, within[-1]))
        launch(kernel, *args, **constants)

    monkeypatch.setattr(host, "launch", checked)
    monkeypatch.setattr(host, "on_device_of", device_of)
    leaves = leaves_of(problem.tensors)
    gradients(problem, problem.call("triton", **leaves), leaves)
    assert {shape for _, shape in launched} == {(35, 136), (35, 130)}, "x in the forward, dy in the backward"


def test_kept_code_is_what_triton_would_choose() -> None:
    """`launching` compares every launch; here is asserted that code is kept, and for which launches."""
    lines = run_compiled(KINDS)
    first = lines.index("round 0 ends")
    assert len(lines[:first]) > 20
    assert not set(lines[:first]) & {"an aligned address", "another float", "another grid"}
    assert lines[first + 1 :] == ["round 1 ends"], "no launch of the second round reaches Triton"


def test_kept_code_is_what_triton_would_choose_in_whole_calls() -> None:
    assert run_compiled(WHOLE_CALLS, str(int(torch.randint(1 << 31, ())))) == ["42"]


def test_launch_hooks_see_the_launches_of_kept_code() -> None:
    without, entered, left, without_again = (line.split() for line in run_compiled(HOOKS))
    assert without == without_again == entered[:1] != ["0"]
    assert len(entered[1:]) == int(without[0])
    assert left == entered


def test_kernels_start_early_where_chip_and_driver_can() -> None:
    hopper, kept, has_no_wait, *elsewhere = run_compiled(EARLY)
    launches, early = map(int, hopper.split())
    assert launches == early > 2
    assert kept == hopper
    assert has_no_wait == "False", "a kernel that does not wait must start in order"
    assert elsewhere == 4 * [f"{launches} 0"], "an old driver, and a chip before sm_90"


def test_logits_are_written_only_where_they_are_returned_or_saved(plan: str) -> None:
    t = _problem().tensors
    factors, options = (t["x"], t["lora_a"], t["lora_b"]), {"gate_weight": t["gate_weight"], "top_k": 2, "backend": "triton"}
    with counted() as counts:
        lmoe(*factors, **options)
    assert stored_to(counts, "logits") == 0
    with counted() as counts:
        lmoe(*factors, **options, return_router_logits=True)
    assert stored_to(counts, "logits") == 35 * 5 * 4
