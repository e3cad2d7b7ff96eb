"""After `warmup` a run compiles nothing: on a GPU that is not there, in processes in which Triton compiles."""

from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton.language as tl

from lmoe_kernels.backends import triton as triton_backend
from tests.triton.compiling import run_compiled

COMPILES = """
import sys
from pathlib import Path

import torch
from triton import knobs

from lmoe_kernels import LMoELinear, warmup
from tools.stubbed_gpu import stubbed_gpu

events = []
knobs.compilation.listener = lambda *, src, cache_hit, **rest: events.append("loaded" if cache_hit else "compiled")
layer = LMoELinear(48, 80, num_experts=4, gate_bias=True, output_router_logits=True, dtype=torch.bfloat16, backend="triton")
with stubbed_gpu() as gpu:
    ready = warmup(layer, tokens=[5, 6], processes=2)
    print(ready, len(events), *set(events))
    events.clear()
    launches, files = gpu.launches(), len(list(Path(sys.argv[1]).rglob("*")))
    x = torch.randn(7, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        layer(x)
    (layer(x).sum() + layer.router_logits.sum()).backward()
    print(gpu.launches() - launches, len(list(Path(sys.argv[1]).rglob("*"))) - files, *events)
"""

RECORDS = """
from contextlib import nullcontext
from itertools import pairwise
from unittest import mock

import torch
from torch import nn

from lmoe_kernels import LMoELinear, warmup
from lmoe_kernels.backends.triton import precompile
from lmoe_kernels.options import Options, Sizes, Wanted
from tools.stubbed_gpu import H100, stubbed_gpu


class OtherLinear(nn.Linear):
    pass


def of_warmup(layer, tokens, **options):
    found = set()

    def ready(calls, device, most, progress):
        for call in precompile.distinct(calls, H100):
            found.update(precompile.kernels_of(call))
        return len(found)

    with mock.patch.object(precompile, "ready", ready):
        assert warmup(layer, tokens, **options) == len(found)
    return found


def of_run(layer, tokens, dtype, autocast=False, backward=True):
    with precompile.recording() as found, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        for number in tokens:
            x = torch.randn(number, layer.in_features, dtype=dtype, requires_grad=True)
            with torch.no_grad():
                layer(x)
            if backward and any(p.requires_grad for p in layer.parameters()):
                loss = layer(x).sum()
                (loss + layer.router_logits.sum() if layer.output_router_logits else loss).backward()
    return set(found)


half, single = torch.bfloat16, torch.float32
layers = [
    (LMoELinear.from_linear(linear(48, 80, bias=bias, dtype=dtype), of_experts, backend="triton", **options), dtype)
    for linear, bias, dtype, of_experts, options in (
        (nn.Linear, True, half, None, {}),
        (nn.Linear, False, half, half, {"mixing": "outputs", "output_router_logits": True}),
        (nn.Linear, True, torch.float16, None, {"shared_a": True, "gate_bias": True}),
        (OtherLinear, True, half, None, {"top_k": 2, "renormalize": False}),
        (OtherLinear, True, single, None, {"num_experts": 3, "rank": 5}),
        (nn.Linear, False, half, None, {"num_experts": 128, "top_k": 2}),  # grouped
    )
]
some = [1, 5, 80, 700]
with stubbed_gpu():
    for layer, dtype in layers:
        assert of_run(layer, some, dtype) == of_warmup(layer, some), layer
        assert of_run(layer, some, dtype, backward=False) == of_warmup(layer, some, backward=False), layer
    layer, dtype = layers[0]
    layer.lora_a.requires_grad_(False)
    assert of_run(layer, some, dtype) == of_warmup(layer, some)
    layer.requires_grad_(False)
    assert of_run(layer, some, dtype) == of_warmup(layer, some)
    layer, dtype = layers[4]
    assert of_run(layer, [5], dtype, autocast=True) == of_warmup(layer, 5, dtype=half)
    for options in ({"dropout": 0.1}, {"dropout": 0.5, "output_router_logits": True}, {"top_k": 2, "choice_bias": True}):
        layer = LMoELinear(48, 80, num_experts=4, gate_bias=True, dtype=half, backend="triton", **options)
        in_training = of_run(layer, some, half)
        layer.eval()
        assert of_warmup(layer, some, backward=False) == of_run(layer, some, half, backward=False), options
        assert of_warmup(layer, some) == in_training | of_run(layer, some, half, backward=False), options
    model = nn.ModuleList([layer for layer, _ in layers if layer.weight.dtype == half])
    assert of_warmup(model, 5) == set().union(*(of_warmup(layer, 5) for layer in model))
    every = [1, 16, 64, 65, 512, 1000, 1023, 1024, 8192, 13000, 65536]
    for features in ((4096, 4096), (64, 4096), (4096, 64), (64, 16384), (16384, 64)):
        for experts in (8, 64):
            layer = LMoELinear(*features, num_experts=experts, dtype=half, backend="triton", device="meta")
            alone = {number: of_warmup(layer, number) for number in every}
            for pair in pairwise(every):
                assert of_warmup(layer, pair) == of_warmup(layer, pair[::-1]) == alone[pair[0]] | alone[pair[1]], pair
            assert of_warmup(layer, every) == set().union(*alone.values())
    print(len(of_warmup(layer, every)), len(alone[16]))

    given = (single, single, single, None, None)
    call = precompile.Call(Sizes(5, 48, 80, 4, 16, 4), single, given, 0, Options(), False, Wanted(*[False] * 6))
    exact = precompile.kernels_of(call)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the user's flag, which the processes must follow
    with precompile.Processes(1, H100) as processes:
        (found,) = processes.map(precompile.kernels_of, [call])
    assert found == precompile.kernels_of(call) != exact
"""


def test_no_kernel_reads_a_global_constant() -> None:
    """Triton hashes those into the name of a compiled kernel only if a kernel that it calls was hashed before."""
    for path in Path(triton_backend.__path__[0]).glob("*.py"):
        module = import_module(f"{triton_backend.__name__}.{path.stem}")
        assert not [name for name, value in vars(module).items() if isinstance(value, tl.constexpr)], path.name


def test_a_run_compiles_nothing_after_it(tmp_path) -> None:
    """With another number of tokens."""
    warmed, ran = run_compiled(COMPILES, str(tmp_path), TRITON_CACHE_DIR=str(tmp_path))
    ready, loads, *kinds = warmed.split()
    assert (int(ready), kinds) == (int(loads), ["loaded"])
    launches, new_files, *events = ran.split()
    assert int(launches) > 5
    assert (int(new_files), events) == (0, [])


def test_it_knows_every_kernel_of_a_run() -> None:
    several, one = map(int, run_compiled(RECORDS)[-1].split())
    assert several > one
