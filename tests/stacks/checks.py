"""All checks on two processes, by name; each yields the names of its parts that passed."""

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lmoe_kernels import apply_lmoe, lmoe_layers, load_lmoe, remove_lmoe, save_lmoe
from tests.models import llama, state
from tests.stacks.flow import MORE, STEPS, barrier, equal, flow, plain_model, rank, train, wrapped
from tests.stacks.wrappings import ONE_PROCESS, STACKS

KEPT = StateDictOptions(ignore_frozen_params=True)
DISTRIBUTED = ("DDP", "FSDP1", "FSDP1 whole", "FSDP1, flat parameters", "FSDP2", "FSDP2 whole")
SHARDED = DISTRIBUTED[1:]


def from_each_into_the_next(seed: int, folder: Path) -> Iterator[str]:
    """One adapter is loaded into every wrapping of an fp64 model and saved from it in turn; it stays bitwise the same."""
    first = plain_model(ONE_PROCESS["plain"], seed)
    if rank() == 0:
        save_lmoe(first, folder / "0")
    barrier()
    true = load_file(folder / "0" / "lmoe.safetensors")
    of_fp64 = {name: stack for name, stack in {**STACKS, **ONE_PROCESS}.items() if stack.base == torch.float64}
    for i, (name, stack) in enumerate(of_fp64.items()):
        model, _ = wrapped(stack, seed + 1, other_experts=True)
        load_lmoe(model, folder / str(i))
        save_lmoe(model, folder / str(i + 1))
        barrier()
        equal(load_file(folder / str(i + 1) / "lmoe.safetensors"), true, name)
        yield name


def peft_interop(seed: int, folder: Path) -> Iterator[str]:
    """A LoRA of PEFT is trained in the same model; PEFT itself saves and loads it."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for name in ("DDP", "FSDP1", "FSDP2"):
        parts = flow(STACKS[name]._replace(adapter=lambda model: get_peft_model(model, config)), seed, folder / name)
        for part in ("trains", "saves", "loads elsewhere"):
            assert next(parts) == part
        yield name


def from_the_meta_device(seed: int, folder: Path) -> Iterator[str]:
    """Large models are sharded on the meta device, where layers have names and shapes but no numbers yet."""
    plain = plain_model(ONE_PROCESS["plain"], seed)
    if rank() == 0:
        save_lmoe(plain, folder)
    barrier()
    model = STACKS["FSDP2"].wrap(copy.deepcopy(plain).to("meta"))
    with pytest.raises(ValueError, match="must have data"):
        load_lmoe(model, folder)
    model.to_empty(device="cpu")
    for layer in lmoe_layers(model).values():
        layer.reset_parameters()
    assert not any(layer.lora_b.full_tensor().any() for layer in lmoe_layers(model).values())
    load_lmoe(model, folder)
    save_lmoe(model, folder / "again")
    barrier()
    equal(load_file(folder / "again" / "lmoe.safetensors"), load_file(folder / "lmoe.safetensors"), "from the meta device")
    yield "passes"


def no_new_layers(seed: int, folder: Path) -> Iterator[str]:
    """A distributed model gets no L-MoE layers and stays unchanged."""
    saved = plain_model(STACKS["DDP"], seed)
    save_lmoe(saved, folder)
    barrier()
    for name in DISTRIBUTED:
        model = STACKS[name].wrap(llama())
        for change in (partial(apply_lmoe, model, "q_proj"), partial(load_lmoe, model, folder)):
            refuses(model, change, "before it is distributed, got one")
        with_layers, _ = wrapped(STACKS[name], seed)
        refuses(with_layers, partial(remove_lmoe, with_layers), "not be distributed, got one")
        yield name
    model = llama()
    fully_shard(model.model.layers[1])
    refuses(model, partial(apply_lmoe, model, "lm_head"), "before it is distributed, got one of which some")
    yield "one block in FSDP2"


def refuses(model: nn.Module, change: Callable[[], object], text: str) -> None:
    before, names = state(model), list(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        change()
    assert "\n" not in str(caught.value)
    assert state(model) == before
    assert list(model.state_dict()) == names


def module_inside_fsdp1(seed: int, folder: Path) -> Iterator[str]:
    """The module inside of FSDP1 cannot be gathered by itself, so that it is neither saved nor loaded."""
    save_lmoe(plain_model(ONE_PROCESS["plain"], seed), folder / f"plain-{rank()}")
    for name in ("FSDP1", "FSDP1 whole", "FSDP1, flat parameters"):
        model, _ = wrapped(STACKS[name], seed)
        inside = extract_model_from_parallel(model)  # Accelerate's unwrap_model
        text = "must be the module that FullyShardedDataParallel returned, got the module inside it"
        refuses(inside, partial(save_lmoe, inside, folder / "none"), text)
        refuses(inside, partial(load_lmoe, inside, folder / f"plain-{rank()}"), text)
        refuses(inside, partial(apply_lmoe, inside, "k_proj"), "got one in FullyShardedDataParallel")
        assert not (folder / "none").exists()
        yield name


def unwrapped_by_accelerate(seed: int, folder: Path) -> Iterator[str]:
    """If each process holds the whole model, the module inside of the wrapper can be saved too."""
    model, _ = wrapped(STACKS["Accelerate"], seed)
    save_lmoe(model, folder / "prepared")
    save_lmoe(Accelerator().unwrap_model(model), folder / "unwrapped")
    barrier()
    prepared, inside = (load_file(folder / name / "lmoe.safetensors") for name in ("prepared", "unwrapped"))
    equal(inside, prepared, "unwrapped")
    yield "passes"


def a_save_that_fails(seed: int, folder: Path) -> Iterator[str]:
    """It raises on every process, and no process waits for another."""
    folder.mkdir(exist_ok=True)
    blocked = folder / "file"
    blocked.write_text("not a directory")
    barrier()
    for name in SHARDED:
        model, _ = wrapped(STACKS[name], seed)
        error, text = (FileExistsError, "") if rank() == 0 else (RuntimeError, "save_lmoe: process 0 failed: ")
        with pytest.raises(error, match=text):
            save_lmoe(model, blocked)
        save_lmoe(model, folder / name)
        assert blocked.read_text() == "not a directory"
        yield name


def a_load_that_fails(seed: int, folder: Path) -> Iterator[str]:
    """If one process cannot read the directory, for example on a disk of its own, all processes raise."""
    adapter = folder / str(rank())
    save_lmoe(plain_model(ONE_PROCESS["plain"], seed), adapter)
    if rank() == 1:
        (adapter / "lmoe.safetensors").unlink()
    for name in SHARDED:
        model, _ = wrapped(STACKS[name], seed)
        error, text = (RuntimeError, "load_lmoe: process 1 failed: ") if rank() == 0 else (FileNotFoundError, "not exist")
        with pytest.raises(error, match=text):
            load_lmoe(model, adapter)
        load_lmoe(model, folder / "0")
        yield name


def all_save_at_once(seed: int, folder: Path) -> Iterator[str]:
    """Every process of a data-parallel training writes the same two files to one place; no reader sees a partial file."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(2048, 2048, bias=False))  # large enough for a reader to see a partial file
    apply_lmoe(layers, "0", num_experts=8, rank=16)
    model = nn.parallel.DistributedDataParallel(layers)
    save_lmoe(model, folder)
    barrier()
    true = load_file(folder / "lmoe.safetensors")
    for turn in range(60):
        if turn % 2 == rank():
            save_lmoe(model, folder)
        else:
            equal(load_file(folder / "lmoe.safetensors"), true, "while another writes")
    barrier()
    assert sorted(file.name for file in folder.iterdir()) == ["lmoe.safetensors", "lmoe_config.json"]
    yield "passes"


def torch_distributed_checkpoint(seed: int, folder: Path) -> Iterator[str]:
    """torch's own checkpoints name tensors as the plain model does, and a training resumes from them bitwise."""
    plain = {name for name, p in plain_model(ONE_PROCESS["plain"], seed).named_parameters() if p.requires_grad}
    for name in ("DDP", "FSDP1", "FSDP1, flat parameters", "FSDP2", "FSDP2 over compiled, checkpointed blocks"):
        model, optimizer = wrapped(STACKS[name], seed)
        train(model, optimizer, seed, 0, STEPS)
        kept = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))
        if rank() == 0:
            assert kept.keys() == plain, name
        tensors, of_optimizer = get_state_dict(model, optimizer, options=KEPT)
        dcp.save({"model": tensors, "optimizer": of_optimizer}, checkpoint_id=folder / name)
        train(model, optimizer, seed, STEPS, MORE)
        save_lmoe(model, folder / f"{name}-on")

        resumed, optimizer = wrapped(STACKS[name], seed, other_experts=True)
        tensors, of_optimizer = get_state_dict(resumed, optimizer, options=KEPT)
        dcp.load({"model": tensors, "optimizer": of_optimizer}, checkpoint_id=folder / name)
        partly = StateDictOptions(strict=False)
        set_state_dict(resumed, optimizer, model_state_dict=tensors, optim_state_dict=of_optimizer, options=partly)
        train(resumed, optimizer, seed, STEPS, MORE)
        save_lmoe(resumed, folder / f"{name}-resumed")
        barrier()
        on, again = (load_file(folder / f"{name}-{end}" / "lmoe.safetensors") for end in ("on", "resumed"))
        equal(again, on, name)
        yield name


Check = Callable[[int, Path], Iterator[str]]
CHECKS: dict[str, Check] = {
    **{name: partial(flow, stack) for name, stack in STACKS.items()},
    "from each into the next": from_each_into_the_next,
    "with PEFT": peft_interop,
    "from the meta device": from_the_meta_device,
    "no new layers": no_new_layers,
    "module inside FSDP1": module_inside_fsdp1,
    "unwrapped by Accelerate": unwrapped_by_accelerate,
    "a save that fails": a_save_that_fails,
    "a load that fails": a_load_that_fails,
    "all save at once": all_save_at_once,
    "torch.distributed.checkpoint": torch_distributed_checkpoint,
}
