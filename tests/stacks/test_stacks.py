"""Real training stacks: each trains bitwise as the plain model does, and saves, loads and resumes without any loss.

Two processes run all checks of tests/stacks once; the tests here read what they report.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import nn

from lmoe_kernels import lmoe_layers, load_lmoe, save_lmoe
from tests.models import llama, with_experts
from tests.stacks.checks import CHECKS
from tests.stacks.flow import flow
from tests.stacks.worker import WORLD, Outcome, outcome_of
from tests.stacks.wrappings import ONE_PROCESS, STACKS

ROOT = Path(__file__).parents[2]
SECONDS = 300  # after which two processes that hang are ended
STACKS_AND_PLAIN = [*ONE_PROCESS, *STACKS]
Reports = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The outcome of every check: on each of two processes, or in this one. The workers of pytest-xdist share one run."""
    if not hasattr(request.config, "workerinput"):
        return _outcomes(tmp_path_factory.mktemp("stacks"), request.config.option.seed)
    shared = tmp_path_factory.getbasetemp().parent / "stacks"
    with FileLock(f"{shared}.lock"):
        file = shared / "outcomes.json"
        if not file.exists():
            shared.mkdir(exist_ok=True)
            file.write_text(json.dumps(_outcomes(shared, request.config.option.seed)))
        return json.loads(file.read_text())


def _outcomes(folder: Path, seed: int) -> Reports:
    """Run every check, in two processes and in this one."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.stacks.worker"]
    address = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": str(WORLD)}
    environment = {**os.environ, **address, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(seed), str(folder)], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            for rank in range(WORLD)
        ]
        try:
            alone = {n: [outcome_of(partial(flow, stack), seed, folder / n)] for n, stack in ONE_PROCESS.items()}
            with suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(SECONDS)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    files = [folder / f"report-{rank}.json" for rank in range(WORLD)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    end = (folder / "log").read_text()[-2000:]
    unreached = Outcome(passed=[], error=f"not reached; the log's end: {end}")
    return {**alone, **{name: [report.get(name, unreached) for report in found] for name in CHECKS}}


def _assert_passed(outcomes: list[Outcome], part: str | None = None) -> None:
    """Raise unless a part of a check, or all of it, passed on every process."""
    for rank, outcome in enumerate(outcomes):
        assert outcome["error"] is None or part in outcome["passed"], f"on process {rank}: {outcome['error']}"


@pytest.mark.parametrize("stack", STACKS_AND_PLAIN)
def test_trains(stack: str, reports: Reports) -> None:
    """After two steps all that is trained is bitwise what the plain model's training gives, on every process."""
    _assert_passed(reports[stack], "trains")


@pytest.mark.parametrize("stack", STACKS_AND_PLAIN)
def test_saves(stack: str, reports: Reports) -> None:
    """The file holds the trained tensors under the plain model's names."""
    _assert_passed(reports[stack], "saves")


@pytest.mark.parametrize("stack", STACKS_AND_PLAIN)
def test_loads_elsewhere(stack: str, reports: Reports) -> None:
    """A plain model loads the file."""
    _assert_passed(reports[stack], "loads elsewhere")


@pytest.mark.parametrize("stack", STACKS_AND_PLAIN)
def test_resumes(stack: str, reports: Reports) -> None:
    """A new model that loads the file takes the same two further steps, bitwise."""
    _assert_passed(reports[stack], "resumes")


def test_from_each_wrapping_into_the_next(reports: Reports) -> None:
    _assert_passed(reports["from each into the next"])


def test_peft_interop(reports: Reports) -> None:
    _assert_passed(reports["with PEFT"])


def test_from_the_meta_device(reports: Reports) -> None:
    _assert_passed(reports["from the meta device"])


def test_a_distributed_model_gets_no_new_layers(reports: Reports) -> None:
    _assert_passed(reports["no new layers"])


def test_the_module_inside_fsdp1_is_refused(reports: Reports) -> None:
    _assert_passed(reports["module inside FSDP1"])


def test_unwrapped_by_accelerate(reports: Reports) -> None:
    _assert_passed(reports["unwrapped by Accelerate"])


def test_a_save_that_fails_raises_on_every_process(reports: Reports) -> None:
    _assert_passed(reports["a save that fails"])


def test_a_load_that_fails_raises_on_every_process(reports: Reports) -> None:
    _assert_passed(reports["a load that fails"])


def test_all_processes_may_save_to_one_place(reports: Reports) -> None:
    _assert_passed(reports["all save at once"])


def test_checkpoints_of_torch_distributed(reports: Reports) -> None:
    _assert_passed(reports["torch.distributed.checkpoint"])


def test_a_tensor_of_another_shape_is_never_written(tmp_path: Path) -> None:
    """A tensor may have another shape if an unknown library sharded the model."""
    model = with_experts(llama())
    layer = lmoe_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.lora_b = nn.Parameter(layer.lora_b.data.flatten()[:17])
    with pytest.raises(
        ValueError, match=r"q_proj.lora_b must have shape \(3, 2, 16\), got \(17,\): a part of a sharded model\?"
    ):
        save_lmoe(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_buffers_that_others_add_to_a_layer_are_not_saved(tmp_path: Path) -> None:
    """A hook may keep a counter in a buffer; a plain model has no place for it."""
    model = with_experts(llama())
    layer = lmoe_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.register_buffer("seen", torch.tensor(5))
    save_lmoe(model, tmp_path)
    assert not any("seen" in name for name in load_file(tmp_path / "lmoe.safetensors"))
    layer.seen += 1
    load_lmoe(model, tmp_path)
    assert layer.seen == 6
    load_lmoe(llama(), tmp_path)
