"""Two tensor-parallel ranks, whose key and value heads are cut or, if there is one, repeated."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.vllm import mixed, tiny


@pytest.fixture(params=[1, 2], ids=["one kv head", "two kv heads"])
def base(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Path:
    """The tiny Llama with this number of key and value heads."""
    config = LlamaConfig.from_pretrained(base, num_key_value_heads=request.param)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for file in base.glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "base"


def test_two_ranks(base: Path, tmp_path: Path, engine, generate) -> None:
    model = mixed.save_adapter(base, tmp_path / "adapter")
    results = generate(engine(tmp_path / "adapter", tensor_parallel_size=2), tiny.prompts(1, 5, 40), 16)
    tiny.assert_generated_by(model, results)
