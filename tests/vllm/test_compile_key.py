"""The key under which vLLM keeps compiled graphs, whose constants are the options of the experts."""

from pathlib import Path
from typing import Any

from tests.vllm import tiny


def _key(base: Path, directory: Path, **options: Any) -> str:
    from vllm.engine.arg_utils import EngineArgs

    tiny.save_adapter(base, directory, **options)
    overrides = {"lmoe_adapter": str(directory)}
    config = EngineArgs(str(base), quantization="lmoe", hf_overrides=overrides, dtype="float32").create_engine_config()
    return config.compute_hash()


def test_it_depends_on_the_options_under_the_same_path(base: Path, tmp_path: Path) -> None:
    first = _key(base, tmp_path)
    assert _key(base, tmp_path) == first  # other numbers, as after more training
    assert _key(base, tmp_path, mixing="outputs") != first
    assert _key(base, tmp_path, top_k=2) != first
