"""The Python blocks of docs/serving.md run in order, with small models in place of those that the page names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.vllm import tiny
from tests.vllm.test_adapters import scaled
from tests.vllm.tiny import Generated

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_blocks_of_the_page(
    base: Path, tmp_path: Path, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    (tmp_path / "base").symlink_to(base)
    mine = tiny.save_adapter(base, tmp_path / "my_adapter", top_k=2)
    math = tiny.save_adapter(base, tmp_path / "adapters" / "math", num_experts=3)
    tiny.save_adapter(base, tmp_path / "adapters" / "code", ["q_proj", "v_proj"], mixing="outputs")
    alone = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "LLM", lambda model, **options: engine(**options))  # eager and in fp32, with this base
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for number, code in enumerate(blocks):
        exec(compile(code, f"{PAGE.name}, block {number}", "exec"), names)
        if number == 0:
            assert tiny.agreement(mine, [_generated(names["output"])]) > 0.8
    for model, output in zip((math, scaled(math, 0.5), alone), names["outputs"], strict=True):
        assert tiny.agreement(model, [_generated(output)]) > 0.8
    assert names["logprobs"].requires_grad


def _generated(output: Any) -> Generated:
    return Generated(output.prompt_token_ids, list(output.outputs[0].token_ids), [])
