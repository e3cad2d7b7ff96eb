"""The sizes of one benchmark, the tensors for them, and the grids of sizes that a run measures."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from lmoe_kernels.dispatch import BACKENDS, BackendName
from lmoe_kernels.options import Factors, Problem, Sizes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCOPES = ("layer", "delta")
PHASES = ("forward", "backward", "forward+backward")
SCALING = 2.0  # alpha = 2 R, the usual choice: a scaling of one would hide a row that forgets it


@dataclass(frozen=True)
class Shape:
    """Sizes and dtype of one problem, under the names of the command's options, of `LMoELinear`'s, and of the results."""

    tokens: int = 1024
    in_features: int = 2048
    out_features: int = 2048
    num_experts: int = 8
    rank: int = 16
    dtype: str = "float32"

    def __str__(self) -> str:
        features = f"{self.in_features} -> {self.out_features}"
        return f"{features}, T={self.tokens}, E={self.num_experts}, R={self.rank}, {self.dtype}"

    @property
    def sizes(self) -> Sizes:
        """The letters of the same sizes, each expert with an A of its own."""
        return Sizes(self.tokens, self.in_features, self.out_features, self.num_experts, self.rank, self.num_experts)

    @property
    def itemsize(self) -> int:
        """Bytes of one element of the activations."""
        return DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that `make_inputs` draws."""
        features, experts = self.in_features + self.out_features, self.num_experts
        activations = self.tokens * (features + experts)
        parameters = self.in_features * self.out_features + experts * (self.rank * features + self.in_features)
        return (activations + parameters) * self.itemsize

    def problem(self, device: torch.device) -> Problem:
        """What the availability of a backend depends on."""
        return Problem(self.sizes, DTYPES[self.dtype], device)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one problem. Rows take what they need of them; no row writes into them."""

    shape: Shape
    x: Tensor  # (T, I)
    weight: Tensor  # (O, I)
    lora_a: Tensor  # (E, R, I)
    lora_b: Tensor  # (E, R, O)
    gate_weight: Tensor  # (E, I)
    gates: Tensor  # (T, E), for rows that get their gates from outside
    dy: Tensor  # (T, O)

    @property
    def device(self) -> torch.device:
        """The tensors' device."""
        return self.x.device

    @property
    def factors(self) -> Factors:
        """The experts and their gate."""
        return Factors(self.lora_a, self.lora_b, self.gate_weight)

    def tokens(self, start: int, stop: int) -> "Inputs":
        """The same problem for some of its tokens."""
        part = {name: getattr(self, name)[start:stop] for name in ("x", "gates", "dy")}
        return replace(self, shape=replace(self.shape, tokens=len(part["x"])), **part)

    def double(self) -> "Inputs":
        """The same numbers in float64."""
        return replace(self, **{name: t.double() for name, t in vars(self).items() if isinstance(t, Tensor)})


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Draw a problem whose frozen product and delta are about equally large, so that an error in either shows."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens, ins, outs, experts, rank, _ = shape.sizes

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(DTYPES[shape.dtype])

    return Inputs(
        shape=shape,
        x=draw(tokens, ins),
        weight=draw(outs, ins, scale=ins**-0.5),
        lora_a=draw(experts, rank, ins, scale=ins**-0.5),
        lora_b=draw(experts, rank, outs, scale=rank**-0.5),
        gate_weight=draw(experts, ins, scale=2 * ins**-0.5),
        gates=draw(tokens, experts).softmax(dim=1),
        dy=draw(tokens, outs),
    )


def timed_backends() -> list[BackendName]:
    """The package's backends that have rows: all that are registered, without the reference, which no user runs."""
    return [name for name in BACKENDS if name != "reference"]


@dataclass(frozen=True)
class Grid:
    """Shapes, and what is measured of each. `rows` None: every row."""

    shapes: tuple[Shape, ...]
    scopes: tuple[str, ...] = ("layer",)
    phases: tuple[str, ...] = ("forward", "forward+backward")
    rows: tuple[str, ...] | None = None

    def groups(self) -> Iterator[tuple[Shape, str]]:
        """Shape and scope of every group of rows that are measured together."""
        return iter(product(self.shapes, self.scopes))


def cross(
    features: list[tuple[int, int]], tokens: list[int], experts: list[int], ranks: list[int], dtypes: list[str]
) -> tuple[Shape, ...]:
    """Every combination, the tokens varying fastest."""
    combined = product(features, dtypes, experts, ranks, tokens)
    return tuple(Shape(t, ins, outs, e, r, dtype) for (ins, outs), dtype, e, r, t in combined)


def grids(device: torch.device, quick: bool) -> list[Grid]:
    """What is measured where the user names no sizes."""
    few = ("frozen", "peft", "eager", *timed_backends())
    eight, sixteen = [8], [16]
    if quick:
        square = [(1024, 1024)]
        main = cross(square, [1, 64, 512], eight, sixteen, ["float32"])
        return [
            Grid(main),
            Grid(cross(square, [512], eight, sixteen, ["float32"]), scopes=("delta",)),
            Grid(cross(square, [256], [1, 4, 16], sixteen, ["float32"]), phases=PHASES[2:], rows=few),
        ]
    if device.type == "cpu":
        square = [(2048, 2048)]
        main = cross(square, [1, 1024], eight, sixteen, ["float32", "bfloat16"])
        return [
            Grid(main, phases=PHASES),
            Grid(cross(square, [16, 64], eight, sixteen, ["float32", "bfloat16"]), phases=PHASES, rows=(*few, "loop")),
            Grid(cross(square, [4, 256], eight, sixteen, ["float32"]), phases=PHASES[2:], rows=(*few, "loop")),
            Grid(cross(square, [256], [1, 2, 4, 16, 32, 64], sixteen, ["float32"]), phases=PHASES[2:], rows=(*few, "loop")),
            Grid(cross(square, [1024], eight, sixteen, ["float32", "bfloat16"]), scopes=("delta",), phases=PHASES),
            Grid(cross(square, [256], eight, [4, 64], ["float32"]), phases=PHASES[2:], rows=few),
            Grid(cross([(1024, 4096), (4096, 1024)], [256], eight, sixteen, ["float32"]), phases=PHASES[2:], rows=few),
        ]
    squares = [(2048, 2048), (4096, 4096), (8192, 8192)]
    oblong = [(4096, 14336), (14336, 4096)]
    tokens = [1, 4, 16, 64, 256, 512, 1024, 4096, 8192, 16384]
    half = ["bfloat16"]
    goals = (
        *cross([(4096, 4096)], [8192, 512, 16], eight, sixteen, half),
        *cross([(8192, 8192), (2048, 2048), (4096, 14336)], [8192], eight, sixteen, half),
    )
    others = (*cross(squares, tokens, eight, sixteen, half), *cross(oblong, [1, 16, 512, 8192], eight, sixteen, half))
    return [
        Grid(goals, scopes=SCOPES, phases=PHASES),  # first: a run may have few minutes
        Grid(cross([(4096, 4096)], [8192], [1, 2, 4, 16, 32, 64], sixteen, half), rows=(*few, "loop")),
        Grid(tuple(shape for shape in others if shape not in goals), scopes=SCOPES, phases=PHASES),
        Grid(cross([(4096, 4096)], [8192], eight, sixteen, ["float16", "float32"]), phases=PHASES),
        Grid(cross([(4096, 4096)], [8192], eight, [4, 8, 32, 64], half), rows=few),
    ]
