"""A whole model: a Llama of random weights, frozen; with one LoRA on every linear; and with L-MoE on every linear."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.group import ratio
from benchmarks.measuring.memory import peak_bytes
from benchmarks.measuring.timing import Call, Effort, Spread, clock_for, interleave
from benchmarks.rows.shapes import timed_backends
from benchmarks.rows.table import why_not_timed
from lmoe_kernels import apply_lmoe, lmoe_layers, use_backend
from lmoe_kernels.dispatch import BACKENDS
from lmoe_kernels.options import Problem, Sizes
from tools.error_rule import complaint, errors, worst

TRAINING, DECODING = "training step", "greedy decoding"


@dataclass(frozen=True)
class ModelRecord:
    """One row of the table of whole models."""

    row: str
    label: str
    phase: str
    status: str = "ok"
    seconds: Spread | None = None
    over_frozen: Spread | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    trained_parameters: int | None = None


@dataclass(frozen=True)
class Plan:
    """The model's size and its tasks."""

    config: dict[str, Any]
    dtype: torch.dtype
    batch: int
    sequence: int
    prompt: int
    new_tokens: int

    @property
    def description(self) -> str:
        """One line for the report."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.config.items())
        return (
            f"Llama ({sizes}), {str(self.dtype).removeprefix('torch.')}; training on {self.batch} x {self.sequence} tokens, "
            f"decoding {self.new_tokens} tokens after {self.prompt}; E=8, R=16 on every linear"
        )


def plan_for(device: torch.device, quick: bool) -> Plan:
    """About 1.1 billion parameters on a GPU, 3.4 million on a CPU."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    )  # fmt: skip
    on_cpu = device.type == "cpu"
    sizes = (512, 256, 704, 4, 8, 8) if on_cpu else (32000, 2048, 8192, 16, 32, 8)
    config: dict[str, Any] = dict(zip(names, sizes, strict=True))
    if on_cpu:
        return Plan(config, torch.float32, 2, 64 if quick else 256, 16, 16 if quick else 48)
    return Plan(config, torch.bfloat16, 4, 2048, 128, 64)


class Models:
    """The variants of a model: `visit` times training and decoding interleaved, `records` sums up all visits."""

    def __init__(self, plan: Plan, device: torch.device, effort: Effort) -> None:
        self.plan, self.device, self.effort = plan, device, effort
        self.not_installed: str | None = None
        self.found: dict[str, ModelRecord] = {}  # by variant: all that needs no clock
        self.samples: dict[str, list[dict[str, list[float]]]] = {}  # by phase, one dict a visit
        self.peaks: dict[tuple[str, str], int] = {}  # by phase and variant

    def __str__(self) -> str:
        return "a whole model"

    def visit(self) -> None:
        """Build every variant, check it the first time, and time both phases."""
        plan, device = self.plan, self.device
        try:
            variants = _variants(plan, device)
        except ImportError as error:
            self.not_installed = f"not installed: pip install transformers peft ({error})"
            return
        ids = torch.randint(0, plan.config["vocab_size"], (plan.batch, plan.sequence), device=device)
        for name, (label, model) in variants.items():
            if name not in self.found:
                wrong = _complaint(name, model, ids[:1, :16])
                status = "ok" if wrong is None else f"wrong result: {wrong}"
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                self.found[name] = ModelRecord(name, label, "", status, trained_parameters=trained)
        for phase, make in PHASES.items():
            calls = {
                name: _with_backend(name, make(model, plan, ids))
                for name, (_, model) in variants.items()
                if self.found[name].status == "ok"
            }
            rows = {name: [call] for name, call in calls.items()}
            for name, call in calls.items():
                if (phase, name) not in self.peaks:
                    self.peaks[phase, name] = peak_bytes(call, device)
            taken = interleave(rows, clock_for(device), self.effort)
            # at the end, so that an interrupted visit leaves no trace
            self.samples[phase] = [*self.samples.get(phase, []), taken]

    def records(self) -> Iterator[ModelRecord]:
        """Every variant in every phase that was visited."""
        if self.not_installed is not None:
            yield from (ModelRecord("model", "a whole model", phase, self.not_installed) for phase in PHASES)
        for phase, visits in self.samples.items():
            tokens = self.plan.batch * self.plan.sequence if phase == TRAINING else self.plan.new_tokens
            for name, record in self.found.items():
                if record.status != "ok":
                    yield replace(record, phase=phase, trained_parameters=None)
                    continue
                seconds = Spread.of([visit[name] for visit in visits])
                yield replace(
                    record, phase=phase, seconds=seconds, over_frozen=ratio(visits, name, "frozen"),
                    tokens_per_second=tokens / seconds.median, peak_bytes=self.peaks[phase, name],
                )  # fmt: skip


def _variants(plan: Plan, device: torch.device) -> dict[str, tuple[str, Any]]:
    """The same weights alone, with PEFT, and with L-MoE on each backend that is timed here."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    longest = max(plan.sequence, plan.prompt + plan.new_tokens)
    config = LlamaConfig(**plan.config, max_position_embeddings=longest, pad_token_id=0)
    with device:  # a GPU draws the weights faster
        frozen: Any = LlamaForCausalLM(config)
    frozen = frozen.to(dtype=plan.dtype).requires_grad_(False).eval()
    variants: dict[str, tuple[str, nn.Module]] = {"frozen": ("the frozen model", frozen)}

    lora = LoraConfig(r=16, lora_alpha=32, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj")
    peft: Any = inject_adapter_in_model(lora, deepcopy(frozen))
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_" in name)
    variants["peft"] = ("PEFT, one LoRA", peft.to(plan.dtype))

    mixture = deepcopy(frozen)
    apply_lmoe(mixture, "all-linear", num_experts=8, rank=16, alpha=32)
    for layer in lmoe_layers(mixture).values():
        nn.init.normal_(layer.lora_b, std=0.02)  # zero at the start: then a wrong delta would not show
    features = plan.config["hidden_size"]
    problem = Problem(Sizes(plan.batch * plan.sequence, features, features, 8, 16, 8), plan.dtype, device)
    for name in timed_backends():
        if why_not_timed(name, problem) is None:
            variants[name] = (f"L-MoE, E=8, backend {name}", deepcopy(mixture))
    return variants


def _complaint(name: str, model: Any, ids: Tensor) -> str | None:
    """Judge the logits by the same model in float64; in plain PyTorch, L-MoE's layers run the literal reference.

    Batches of several sizes stand for several orders of the sums: their products are cut into other blocks.
    """
    with torch.no_grad():
        ours = _with_backend(name, lambda: model(ids).logits)()
        with use_backend("reference"):
            true = deepcopy(model).double()(ids).logits
            of_plain = worst(errors(model(ids.repeat(copies, 1)).logits[: len(ids)], true) for copies in (1, 2, 4))
    return complaint(ours, of_plain, true, ours.dtype)


def _with_backend(name: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    if name not in BACKENDS:
        return call

    def with_backend() -> Any:
        with use_backend(name):
            return call()

    return with_backend


def _training_step(model: Any, plan: Plan, ids: Tensor) -> Call:
    """Forward, backward and AdamW. The frozen model trains nothing: its backward goes down to the embedded tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        return lambda: torch.autograd.grad(model(inputs_embeds=embedded, labels=ids).loss, embedded)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _decoding(model: Any, plan: Plan, ids: Tensor) -> Call:
    """One sequence with cached keys and values; each step takes the most likely token."""
    prompt, count = ids[:1, : plan.prompt], plan.new_tokens
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


PHASES = {TRAINING: _training_step, DECODING: _decoding}
