"""The choice of an adapter for each token in a vLLM server: what needs no vLLM."""

import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lmoe_kernels.vllm.adapters import (
    AdapterManager,
    Choice,
    TokenChoices,
    check_setup,
    choice_of,
    directories_of,
)
from lmoe_kernels.vllm.layouts import adapter_directories

MATH, CODE = "/adapters/math", "/adapters/code"


class NotFoundError(Exception):
    """As vLLM's error: the server knows it by its text."""

    def __init__(self, name: str, path: str) -> None:
        self.message = f"Loading lora {name} failed: No adapter found for {path}"

    def __str__(self) -> str:
        return self.message


class Request(NamedTuple):
    """What is read of a LoRARequest."""

    lora_int_id: int
    lora_path: str
    load_inplace: bool = False

    @property
    def lora_name(self) -> str:
        return f"name {self.lora_int_id}"


def batch(*ids: int) -> Any:
    return SimpleNamespace(index_mapping=ids)


@pytest.fixture
def tokens() -> TokenChoices:
    return TokenChoices(8, (MATH, CODE))


@pytest.fixture
def manager(tokens: TokenChoices, monkeypatch: pytest.MonkeyPatch) -> AdapterManager:
    exceptions: Any = ModuleType("vllm.exceptions")
    exceptions.LoRAAdapterNotFoundError = NotFoundError
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    return AdapterManager(tokens, reload=lambda group: None)


def test_a_directory_is_known_by_any_of_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    math, code = tmp_path / "math", tmp_path / "code"
    math.mkdir()
    code.mkdir()
    (tmp_path / "link").symlink_to(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    named = directories_of({"math": "math", "code": f"{code}/", "again": "./math", "linked": "link"})
    assert named == {"math": str(math), "code": str(code)}
    directories = tuple(named.values())
    for path, group in ((f"{math}", 0), ("math", 0), (f"{code}/../code", 1), ("link", 1), ("~/math", 0)):
        assert choice_of(path, directories) == Choice(group, 1.0)
        assert choice_of(f"{path}#scale=-0.25", directories) == Choice(group, -0.25)


@pytest.mark.parametrize(
    "adapters, error, got",
    [
        ({}, ValueError, "got none"),
        ("math=DIR", TypeError, "got str"),
        ({"math": ""}, TypeError, "got 'math': ''"),
        ({"math": ["DIR"]}, TypeError, r"got 'math': \['DIR'\]"),
        ({3: "DIR"}, TypeError, "got 3: 'DIR'"),
    ],
)
def test_adapters_must_be_names_and_directories(adapters: object, error: type[Exception], got: str) -> None:
    must = "lmoe_adapters of --hf-overrides must map names of adapters to directories"
    with pytest.raises(error, match=f"^lmoe: {must}, {got}$"):
        directories_of(adapters)


def test_every_directory_must_exist(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=f"^lmoe: .* must name directories that save_lmoe wrote, got 'code': '{missing}'$"):
        directories_of({"math": str(tmp_path), "code": missing})


@pytest.mark.parametrize("text", ["", "half", "nan", "inf", "-inf", "1e39", "0.5#scale=", "1" * 400])
def test_a_scale_must_be_a_finite_number(text: str) -> None:
    must = "lmoe: the path of a LoRARequest must end with '#scale=' and a finite number, got "
    with pytest.raises(ValueError) as raised:
        choice_of(f"{MATH}#scale={text}", (MATH, CODE))
    assert str(raised.value).startswith(must)


def test_scales_at_the_end_of_the_range() -> None:
    for scale in (0.0, -0.0, 3.4e38, -3.4e38, 1e-45):
        assert choice_of(f"{CODE}#scale={scale!r}", (MATH, CODE)) == Choice(1, scale)


@pytest.mark.parametrize("path", ["/adapters/other", "/adapters", f"{MATH}/x", f"{MATH}#scale=1#scale=2", f"{MATH}#"])
def test_another_directory_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"^lmoe: the path .* must be a directory of lmoe_adapters \(.*\), got '.*'$"):
        choice_of(path, (MATH, CODE))


def test_every_token_gets_the_choice_of_its_request(tokens: TokenChoices) -> None:
    choices = {7: Choice(0, 1.0), 2: Choice(1, 0.5), 99: Choice(0, -3.0)}
    for count in (8, 0, 1, 5, 8, 3):
        ids = [random.choice([0, 7, 2, 99]) for _ in range(count)]
        tokens.write(ids, choices)
        expected = [choices.get(number, Choice(-1, 1.0)) for number in ids] + [Choice(-1, 1.0)] * (8 - count)
        assert tokens.group.tolist() == [choice.group for choice in expected]
        assert tokens.scale.tolist() == [choice.scale for choice in expected]


def test_addresses_never_change(tokens: TokenChoices) -> None:
    assert (tokens.group.dtype, tokens.scale.dtype) == (torch.int32, torch.float32)
    assert tokens.group.is_contiguous()
    assert tokens.scale.is_contiguous()
    assert tokens.group.tolist() == [-1] * 8  # before the first batch
    assert tokens.scale.tolist() == [1.0] * 8
    group, scale = tokens.group, tokens.scale
    before = group.data_ptr(), scale.data_ptr()
    tokens.write((1, 0, 1), {1: Choice(1, 2.0)})
    assert (tokens.group.data_ptr(), tokens.scale.data_ptr()) == before
    assert group[:3].tolist() == [1, -1, 1]
    assert scale[:3].tolist() == [2.0, 1.0, 2.0]


def test_a_token_of_an_unknown_id_is_an_error(tokens: TokenChoices) -> None:
    with pytest.raises(KeyError):
        tokens.write((1, 2), {1: Choice(0, 1.0)})


def test_the_manager_learns_ids_from_requests(manager: AdapterManager, tokens: TokenChoices) -> None:
    manager.set_active_adapters({Request(4, MATH), Request(5, f"{CODE}#scale=0.5")}, batch(5, 0, 4, 4))
    assert tokens.group[:5].tolist() == [1, -1, 0, 0, -1]
    assert tokens.scale[:5].tolist() == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert manager.list_adapters() == {4, 5}
    assert manager.pin_adapter(4)
    assert not manager.pin_adapter(6)
    manager.set_active_adapters({Request(4, CODE)}, batch(4))  # the name was loaded again from another directory
    assert tokens.group[:4].tolist() == [1, -1, -1, -1]
    assert manager.remove_adapter(5)
    assert not manager.remove_adapter(5)
    manager.remove_all_adapters()
    assert manager.list_adapters() == set()
    manager.set_active_adapters({Request(5, MATH)}, None)  # without tokens nothing is written
    assert tokens.group[:2].tolist() == [1, -1]
    assert manager.list_adapters() == {5}


def test_an_unknown_directory_changes_nothing(manager: AdapterManager) -> None:
    assert manager.add_adapter(Request(1, MATH))
    for call in (
        lambda: manager.add_adapter(Request(2, "/other")),
        lambda: manager.add_adapter(Request(1, "/other", load_inplace=True)),
        lambda: manager.set_active_adapters({Request(2, "/other")}, batch(2)),
    ):
        with pytest.raises(NotFoundError, match=r"^lmoe: the path .* got '/other' .*No adapter found for /other") as raised:
            call()
        assert "\n" not in str(raised.value)
        assert manager.list_adapters() == {1}
    assert manager.add_adapter(Request(1, MATH))


def test_only_load_inplace_reads_again(tokens: TokenChoices) -> None:
    read: list[int] = []
    manager = AdapterManager(tokens, read.append)
    manager.add_adapter(Request(1, CODE))
    assert read == []
    manager.add_adapter(Request(1, f"{CODE}#scale=2", load_inplace=True))
    assert read == [1]
    manager.set_active_adapters({Request(1, f"{CODE}#scale=2", load_inplace=True)}, batch(1))  # every forward brings it
    assert read == [1]
    assert tokens.scale[0] == 2.0


def test_a_failed_read_keeps_the_choice(tokens: TokenChoices) -> None:
    def broken(group: int) -> None:
        raise ValueError(f"lmoe: {group} is damaged")

    manager = AdapterManager(tokens, broken)
    manager.add_adapter(Request(1, MATH))
    with pytest.raises(ValueError, match="damaged"):
        manager.add_adapter(Request(1, f"{MATH}#scale=2", load_inplace=True))
    manager.set_active_adapters(set(), batch(1))
    assert tokens.scale[0] == 1.0


def test_a_warm_up_runs_every_group(manager: AdapterManager, tokens: TokenChoices) -> None:
    warm_up = [Request(number, "/not/a/real/path") for number in (1, 2, 3)]
    with manager.dummy_lora_cache():
        assert all(manager.add_dummy_lora(one, rank=8) for one in warm_up)
        assert not manager.add_dummy_lora(warm_up[0], rank=8)
        manager.set_active_adapters(set(warm_up), batch(1, 2, 3, 0))
    assert tokens.group[:5].tolist() == [0, 1, 0, -1, -1]
    manager.remove_all_adapters()
    manager.set_active_adapters({Request(1, CODE)}, batch(1))  # the id means something else now
    assert tokens.group[0] == 1


def vllm_config(**settings: Any) -> Any:
    """What `check_setup` reads, with settings that fit, but for those given."""
    plain = {
        "lora_config": object(), "use_ubatching": False, "prefill_context_parallel_size": 1,
        "use_sequence_parallel_moe": False, "kv_sharing_fast_prefill": False, "is_encoder_decoder": False,
    }  # fmt: skip
    parts = SimpleNamespace(**{**plain, **settings})
    return SimpleNamespace(parallel_config=parts, cache_config=parts, model_config=parts, lora_config=parts.lora_config)


@pytest.mark.parametrize(
    "setting, argument",
    [
        ({"lora_config": None}, "enable_lora"),
        ({"use_ubatching": True}, "enable_dbo or ubatch_size"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size > 1"),
        ({"use_sequence_parallel_moe": True}, "enable_expert_parallel on several ranks"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"is_encoder_decoder": True}, "the base model"),
    ],
)
def test_settings_that_give_layers_other_tokens_are_refused(setting: dict[str, Any], argument: str) -> None:
    check_setup(vllm_config())
    with pytest.raises(ValueError, match=f"^lmoe: {argument} must be .* with lmoe_adapters: .*, got .*$"):
        check_setup(vllm_config(**setting))


def test_no_adapter_may_name_a_layer_of_an_encoder(manager: AdapterManager) -> None:
    def model(*with_experts: str) -> nn.Module:
        layers = {name: nn.Module() for name in ("visual", "merger", "language")}
        for name in with_experts:
            layers[name].lmoe = nn.Module()
        whole: Any = nn.ModuleDict(layers)
        whole.get_mm_mapping = lambda: SimpleNamespace(tower_model=["visual"], connector=["merger"])
        return whole

    fine = model("language")
    assert manager.create_lora_manager(fine, vllm_config()) is fine
    for name in ("visual", "merger"):
        with pytest.raises(ValueError, match=f"^lmoe: .* must name layers of the language model only, got {name}$"):
            manager.create_lora_manager(model("language", name), vllm_config())


def test_one_adapter_or_several(tmp_path: Path) -> None:
    path = str(tmp_path)
    several = SimpleNamespace(lmoe_adapters={"math": path})
    assert adapter_directories(several) == {"math": path}
    both = SimpleNamespace(lmoe_adapter=path, lmoe_adapters={"math": path})
    with pytest.raises(ValueError, match=r"^lmoe: --hf-overrides must name lmoe_adapter or lmoe_adapters, got both$"):
        adapter_directories(both)
