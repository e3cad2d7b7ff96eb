"""`LMoEConfig`: defaults, errors and files; and the registration with PEFT."""

import copy
import json
import subprocess
import sys
from importlib import metadata, reload
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import lmoe_kernels.peft
from lmoe_kernels import LMoELinear
from lmoe_kernels.peft import LMoEConfig, LMoEModel, registration

ROOT = Path(__file__).parents[3]


def test_the_defaults_are_those_of_lmoe_linear() -> None:
    ours, theirs = LMoEConfig().layer_config("any"), LMoELinear(6, 5).mixtures()["default"].config
    assert ours == theirs


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_is_replaced_by_its_value(top_k: int | None, use_rslora: bool) -> None:
    config = LMoEConfig(num_experts=5, r=4, top_k=top_k, use_rslora=use_rslora)
    sharing = top_k or 5
    assert config.lora_alpha == 2 * sharing * (2 if use_rslora else 4)
    options = config.layer_config("any")
    assert options.alpha / options.rank == 2 * sharing


WRONG = {
    "num_experts": (0, "num_experts must be at least 1, got 0"),
    "r": (2.0, "r must be an int, got float"),
    "lora_alpha": ("8", "lora_alpha must be None or a finite number, got str"),
    "lora_dropout": (1.0, "lora_dropout must be a number of at least 0 and below 1, got 1.0"),
    "mixing": ("sum", "mixing must be one of 'factors', 'outputs', got 'sum'"),
    "top_k": (9, "top_k must be in 1 .. E = 8, got 9"),
    "choice_bias": (True, "choice_bias must be False unless top_k is given .*"),
    "expert_names": (["a"], "expert_names must have one name for each of num_experts = 8 experts, got 1"),
    "use_rslora": (1, "use_rslora must be a bool, got int"),
    "router_aux_loss_coef": (-0.1, "router_aux_loss_coef must be a number of at least 0, got -0.1"),
    "router_z_loss_coef": (float("nan"), "router_z_loss_coef must be a number of at least 0, got nan"),
    "target_modules": ([1], r"target_modules must be None, a str or several, got \[1\]"),
    "exclude_modules": (3, "exclude_modules must be None, a str or several, got 3"),
    "modules_to_save": ("score", "modules_to_save must be None or several str, got 'score'"),
    "layers_to_transform": (["1"], r"layers_to_transform must be None, an int or a list of them, got \['1'\]"),
    "layers_pattern": ("layers", "layers_pattern must be None without layers_to_transform, got 'layers'"),
    "rank_pattern": ({"q": 0}, r"rank_pattern\['q'\] must be at least 1, got 0"),
    "alpha_pattern": ([1], "alpha_pattern must be a dict, got list"),
    "backend": ("gpu", "backend must be .*, got 'gpu'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line_in_the_names_of_peft(name: str) -> None:
    value, text = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=rf"\ALMoEConfig: {text}\Z"):
        LMoEConfig(**{name: value})


def test_blocks_need_names_of_layers() -> None:
    with pytest.raises(ValueError, match="layers_to_transform must be None if target_modules is a str, got 1"):
        LMoEConfig(target_modules="all-linear", layers_to_transform=1)


def test_a_file_holds_every_option(tmp_path: Path) -> None:
    config = LMoEConfig(
        num_experts=3, r=4, lora_alpha=5.0, use_rslora=True, mixing="outputs", top_k=2, gate_bias=True, choice_bias=True,
        shared_a=True, expert_names=["a", "b", "c"], lora_dropout=0.1, gate_init_std=0.5, target_modules={"b", "a"},
        exclude_modules=("x",), layers_to_transform=[1, 2], layers_pattern="layers", rank_pattern={"a": 7},
        alpha_pattern={"b": 3}, modules_to_save=["head"], router_aux_loss_coef=0.01, router_z_loss_coef=0.001,
        backend="torch", task_type="CAUSAL_LM",
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    for config_class in (LMoEConfig, PeftConfig):
        loaded = config_class.from_pretrained(str(tmp_path))
        assert type(loaded) is LMoEConfig
        assert loaded == config
    shown = json.loads((tmp_path / "adapter_config.json").read_text())
    assert shown["peft_type"] == "LMOE"
    assert shown["target_modules"] == ["a", "b"]
    assert copy.deepcopy(config) == config


def test_sets_of_peft_are_written_in_order() -> None:
    """For "all-linear" PEFT sets target_modules to a set of names."""
    names = [f"{number}.linear" for number in range(20)]
    config = LMoEConfig()
    config.target_modules = set(names)
    assert config.to_dict()["target_modules"] == sorted(names)


def test_options_of_newer_versions_are_ignored_with_a_warning(tmp_path: Path) -> None:
    LMoEConfig(num_experts=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    with pytest.warns(UserWarning, match="of_a_later_version"):
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded == LMoEConfig(num_experts=3)


def test_another_type_of_adapter_is_refused(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(str(tmp_path))
    text = r"^LMoEConfig.from_pretrained: directory must hold an adapter of type 'LMOE', got one of "
    with pytest.raises(ValueError, match=text):
        LMoEConfig.from_pretrained(str(tmp_path))


def test_importing_twice_registers_once() -> None:
    reload(lmoe_kernels.peft)
    kind = registration.peft_type()
    assert (kind.name, kind.value, str.__str__(kind)) == ("LMOE", "LMOE", "LMOE")
    assert type(kind)("LMOE") is kind
    assert list(type(kind)).count(kind) == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is LMoEConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LMOE"] is LMoEModel


def test_a_foreign_type_of_the_same_name_is_not_replaced() -> None:
    class Foreign(PeftConfig):
        pass

    with pytest.raises(ImportError, match=r"^lmoe_kernels.peft: the type LMOE of PEFT must be free, got <class"):
        registration.register(Foreign, LMoEModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[registration.peft_type()] is LMoEConfig


def test_a_missing_or_old_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in ("0.18.0", "0.19.0.dev0", "0.20rc1", "1.0"):
        monkeypatch.setattr(registration, "version", lambda name, installed=installed: installed)
        registration.require_peft()
    monkeypatch.setattr(registration, "version", lambda name: "0.17.1")
    with pytest.raises(
        ImportError, match=r"^lmoe_kernels.peft: peft must be 0.18 or newer, got 0.17.1: pip install 'peft>=0.18'$"
    ):
        registration.require_peft()

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(registration, "version", missing)
    with pytest.raises(ImportError, match=r"^lmoe_kernels.peft: peft must be installed: pip install 'peft>=0.18'$"):
        registration.require_peft()


def test_a_process_without_the_import_does_not_know_the_type(tmp_path: Path) -> None:
    LMoEConfig().save_pretrained(str(tmp_path))
    program = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as error:
    assert str(error) == "'LMOE'"
else:
    raise AssertionError("it knows the type")
import lmoe_kernels.peft
PeftConfig.from_pretrained({str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
