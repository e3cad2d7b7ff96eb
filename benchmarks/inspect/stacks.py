"""What a Llama block gains from layers that are computed together: counted passes over x, bytes saved, the host's time.

    python -m benchmarks.inspect.stacks [--rounds 60] [--json FILE]

The block is that of Llama 3.2 1B: 2048 features, 512 for k and v, 8192 between gate, up and down; E=8, R=16. "separate" is
`apply_lmoe(stack=False)`, "stacked" is the default.

- Passes: operations of ATen that read x, or a copy of it in another dtype, and reads and writes of matrices that hold its
  gradient or a part of it. Each is as many bytes as x has. The frozen products count. The dtype is fp32: where x is bf16,
  ATen on the CPU casts all of x to compute router logits that are not rounded, and a GPU does not.
- Saved bytes: what a forward of the whole block keeps for its backward, beyond parameters, with experts in fp32.
- Host: CPU time of the block's seven layers on one thread, for 4 tokens and 16 features, where products take no time. Both
  variants are called in turn. The least of the rounds counts; the median, in brackets, shows how busy the machine was.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.inspect.host import HotClock
from benchmarks.measuring.environment import describe
from benchmarks.measuring.timing import Effort, interleave
from lmoe_kernels import apply_lmoe, lmoe_layers, lmoe_linear, ops, stack
from lmoe_kernels.options import Options
from lmoe_kernels.stack import Projection

HIDDEN, OF_KEYS, BETWEEN = 2048, 512, 8192
GROUPS = {"q, k, v": (HIDDEN, OF_KEYS, OF_KEYS), "gate, up": (BETWEEN, BETWEEN)}
VARIANTS = ("separate", "stacked")


class Passes(TorchDispatchMode):
    """Counts reads of a tensor and of its copies, and reads and writes of matrices of its shape that a backward makes."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.shape, self.backward = x.shape, False
        self.tracked = {_storage(x)}
        self.kept: list[Tensor] = []  # so that no new tensor gets the memory of one that was tracked
        self.reads = self.of_gradient = 0
        self.gradients: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation, and count it."""
        kwargs = kwargs or {}
        for op, body in ((ops.forward, ops._forward), (ops.backward, ops._backward)):
            if func is op:
                with self:
                    return body(*args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not func._schema.is_mutable and all(_storage(w) in {_storage(r) for r in read} for w in written):
            return result  # a view
        name = func._schema.name.removeprefix("aten::")
        self.reads += len([t for t in read if _storage(t) in self.tracked])
        self.of_gradient += len([t for t in read if _storage(t) in self.gradients])
        for t in written:
            self.kept.append(t)
            if name == "_to_copy" and any(_storage(r) in self.tracked for r in read):
                self.tracked.add(_storage(t))
            if self.backward and t.shape == self.shape and not name.startswith(("empty", "new_empty")):
                self.gradients.add(_storage(t))
                self.of_gradient += 1
        return result


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def projections_of(features: tuple[int, ...], hidden: int, experts: int, rank: int) -> list[Projection]:
    """Random projections of fp32, whose experts and gates are trained."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).mul_(hidden**-0.5).requires_grad_()

    return [
        Projection(draw(experts, rank, hidden), draw(experts, rank, o), draw(experts, hidden), None, None, weight, None)
        for o in features
        for weight in (torch.randn(o, hidden),)
    ]


def passes(features: tuple[int, ...], variant: str, tokens: int = 1024, hidden: int = HIDDEN) -> dict[str, int]:
    """Passes over x in the forward and in the backward, and over its gradient, of projections with so many features."""
    x = torch.randn(tokens, hidden).requires_grad_()
    group = projections_of(features, hidden, 8, 16)
    options = Options(1.0)
    with Passes(x) as counter:
        if variant == "stacked":
            ys = [y for y, _ in stack.apply(x, group, options, backend="torch", return_logits=False)]
        else:
            ys = [
                lmoe_linear(x, p.weight, None, p.lora_a, p.lora_b, gate_weight=p.gate_weight, backend="torch") for p in group
            ]
        forward = counter.reads
        dys = [torch.randn_like(y) for y in ys]
        counter.backward = True
        torch.autograd.grad(ys, [x, *(t for p in group for t in p if t is not None and t.requires_grad)], dys)
    return {"x, forward": forward, "x, backward": counter.reads - forward, "dx": counter.of_gradient}


def llama_block() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]]:
    """A block of transformers with experts on all layers, and its call for so many tokens."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=BETWEEN, num_attention_heads=32, num_key_value_heads=OF_KEYS // 64,
        head_dim=64,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    block, rotary = LlamaDecoderLayer(config, 0).bfloat16(), LlamaRotaryEmbedding(config)

    def call(block: nn.Module, tokens: int) -> Tensor:
        x = torch.randn(1, tokens, HIDDEN, dtype=torch.bfloat16).requires_grad_()
        embeddings = rotary(x, torch.arange(tokens)[None])
        y = block(x, position_embeddings=embeddings)
        return y[0] if isinstance(y, tuple) else y

    return block, call


def saved_by(call: Callable[[], Tensor]) -> int:
    """Bytes that the graph of a call keeps, without parameters."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t if t._base is None else t._base, nn.Parameter):
            kept[_storage(t)] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    del y
    return sum(kept.values())


def saved_bytes(autocast: bool, tokens: int = 256) -> dict[str, dict[str, float]]:
    """For each variant the saved bytes a token, and those that do not depend on the number of tokens."""
    plain, call = llama_block()
    if autocast:
        plain = plain.float()
    found = {}
    for variant in VARIANTS:
        block = nn.ModuleDict({"block": copy.deepcopy(plain)})
        apply_lmoe(block, "all-linear", num_experts=8, rank=16, stack=variant == "stacked")

        def run(count: int, block: nn.Module = block) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return call(block["block"], count)  # pyright: ignore[reportIndexIssue]

        few, many = (saved_by(lambda count=count: run(count)) for count in (tokens, 2 * tokens))
        each = (many - few) / tokens
        found[variant] = {"a token": each, "of the block": few - each * tokens}
    return found


class Layers(nn.ModuleDict):
    """The seven layers of a block without what is between them."""

    def __init__(self, features: int) -> None:
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        super().__init__({name: nn.Linear(features, features, dtype=torch.bfloat16) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        """All layers, in the order of a block."""
        x = self["o_proj"](self["q_proj"](x) + self["k_proj"](x) + self["v_proj"](x))
        return self["down_proj"](self["gate_proj"](x) + self["up_proj"](x))


def host_microseconds(rounds: int, seconds: float = 0.02) -> dict[str, dict[str, list[float]]]:
    """For each call and variant the least and the median of the rounds."""
    timed: dict[str, list[Callable[[], object]]] = {}
    for variant in VARIANTS:
        model = Layers(16)
        apply_lmoe(model, "all-linear", num_experts=8, rank=16, stack=variant == "stacked")
        x = torch.randn(4, 16, dtype=torch.bfloat16)
        leaf = x.clone().requires_grad_()
        wanted = [leaf, *(p for layer in lmoe_layers(model).values() for p in layer.parameters() if p.requires_grad)]

        def forward(model: nn.Module = model, x: Tensor = x) -> object:
            with torch.no_grad():
                return model(x)

        def both(model: nn.Module = model, leaf: Tensor = leaf, wanted: list[Tensor] = wanted) -> object:
            return torch.autograd.grad(model(leaf).sum(), wanted)

        timed |= {f"no gradients/{variant}": [forward], f"forward and backward/{variant}": [both]}
    effort = Effort(1, seconds=0, min_rounds=rounds, max_rounds=rounds, sample_seconds=seconds, cpu_products=0)
    taken = interleave(timed, HotClock(), effort)
    found: dict[str, dict[str, list[float]]] = {}
    for key, samples in taken.items():
        call, variant = key.split("/")
        found.setdefault(call, {})[variant] = [1e6 * min(samples), 1e6 * sorted(samples)[len(samples) // 2]]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the three tables, and write them as JSON if a file is named."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspect.stacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    counted = {group: {v: passes(features, v) for v in VARIANTS} for group, features in GROUPS.items()}
    saved = {"bf16": saved_bytes(False), "fp32 under autocast": saved_bytes(True)}
    host = host_microseconds(options.rounds)
    facts = describe(torch.device("cpu"))
    print(", ".join(f"{name}: {fact}" for name, fact in facts.items()))
    print(f"passes, of {1024 * HIDDEN * 4:,d} bytes for 1024 tokens in fp32")
    for group, by_variant in counted.items():
        for variant, found in by_variant.items():
            print(f"  {group:<10} {variant:<10} " + ", ".join(f"{what}: {count}" for what, count in found.items()))
    print("saved for the backward of a block")
    for dtype, by_variant in saved.items():
        for variant, found in by_variant.items():
            print(f"  {dtype:<20} {variant:<10} " + ", ".join(f"{n:,.0f} bytes {what}" for what, n in found.items()))
    print("CPU time of seven layers in microseconds, least (median)")
    for call, by_variant in host.items():
        for variant, (least, median) in by_variant.items():
            print(f"  {call:<22} {variant:<10} {least:.0f} ({median:.0f})")
    if options.json is not None:
        found = {"facts": facts, "passes": counted, "saved": saved, "host": host}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
