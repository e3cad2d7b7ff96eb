"""docs/serving.md: its figures are those of the results, and its lines of refusals those that the plugin raises."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lmoe_kernels import apply_lmoe, save_lmoe
from lmoe_kernels.vllm import layouts
from lmoe_kernels.vllm.adapters import check_setup
from lmoe_kernels.vllm.layouts import served_adapter
from tests.repo.test_docs import H200, PAGES, cells, shown

PAGE = PAGES["serving.md"]
LAYERS = {"q, k, v": ("qkv", 1), "gate, up": ("gate_up", 1), "down": ("down", 1), "q, k, v of four adapters": ("qkv", 4)}
COLUMNS = ("frozen", "triton", "cuda", "torch", "separate calls, triton")
ROWS: list[dict[str, Any]] = [json.loads(line) for line in (H200 / "stacked.jsonl").read_text(encoding="utf-8").splitlines()]


def test_table_of_the_stacked_operation_is_that_of_the_h200() -> None:
    table = cells("| us | frozen product", PAGE)
    assert len(table) == 10
    for label, figures in table.items():
        name, _, tokens = label.rpartition(", T=")
        wanted = (*LAYERS[name], int(tokens))
        row = next(row for row in ROWS if (row["layer"], row["adapters"], row["tokens"]) == wanted)
        times = row["us in a graph: median, least, most"]
        assert figures == [shown(times[column][0]) if column in times else "" for column in COLUMNS], label


def test_the_share_of_the_host_is_that_of_the_h200() -> None:
    ranges = []
    for column in COLUMNS[1:]:
        times = [row["us of the host"][column] for row in ROWS if row["tokens"] == 1 and row["adapters"] == 1]
        ranges.append(f"{min(times):.0f} to {max(times):.0f}")
    triton, cuda, torch, separate = ranges
    expected = f"{triton} us for a call with one token on `triton`, {cuda} on `cuda`, {torch} on `torch`, and {separate} for"
    assert expected in " ".join(PAGE.split())


def _served(directory: Path, **options: Any) -> layouts.ServedAdapter:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"down_proj": nn.Linear(160, 64)})])})
    model["lm_head"] = nn.Linear(64, 8, bias=False)
    apply_lmoe(model, "down_proj", num_experts=2, rank=2, **options)
    save_lmoe(model, directory)
    return served_adapter("default", str(directory))


def _other_base(directory: Path) -> None:
    modules: list[tuple[str | None, layouts.ShardId]] = [("layers.0.down_proj", None)]
    members = layouts.members_of([_served(directory)], modules, "layers.0.down_proj", 1)
    layouts.blocks_of(members, layouts.row_cut(96, 96, 0, [64]))


def _damaged(directory: Path) -> None:
    _served(directory)
    (directory / "lmoe.safetensors").write_bytes(b"damaged")
    served_adapter("default", str(directory))


def _setup(directory: Path, *, lora: object = "any", is_encoder_decoder: bool = False, **parallel: bool) -> None:
    model = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
    settings = {"lora_config": lora, "cache_config": None, "model_config": model}
    check_setup(SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **settings))


REFUSED: dict[str, Callable[[Path], object]] = {
    "no adapter is named": lambda directory: layouts.adapter_directories(SimpleNamespace()),
    "no directory": lambda directory: layouts.adapter_directories(SimpleNamespace(lmoe_adapter="DIR")),
    "a damaged file": _damaged,
    "other trained modules": partial(_served, modules_to_save="lm_head"),
    "routers of blocks, of the model, or of prefixes": partial(_served, router="block"),
    "an adapter of another base model": _other_base,
    "several adapters without `--enable-lora`": partial(_setup, lora=None),
    "several adapters with micro-batches, a context-parallel prefill or `kv_sharing_fast_prefill`": partial(
        _setup, use_ubatching=True
    ),
    "several adapters with expert parallelism on several ranks": partial(_setup, use_sequence_parallel_moe=True),
    "several adapters on an encoder-decoder": partial(_setup, is_encoder_decoder=True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_line_of_the_table_is_that_of_the_error(what: str, tmp_path: Path) -> None:
    [line] = cells("| what | the line", PAGE)[what]
    parts = re.split(r"\.\.\.|DIR", line.strip("`"))
    with pytest.raises((ValueError, TypeError)) as error:
        REFUSED[what](tmp_path)
    assert re.fullmatch(".*".join(map(re.escape, parts)), str(error.value)), str(error.value)
