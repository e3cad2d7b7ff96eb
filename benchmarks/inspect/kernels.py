"""A model of every Triton kernel of a call: what machine code, bytes and the assumed rates of a chip say of its time.

    python -m benchmarks.inspect.kernels [--chip H100 ...] [--tokens 8192 ...] [--out benchmarks/results/static]

Nothing is timed and no GPU is needed. Registers, the instructions of the main loop with the tensor-core instructions among
them, and the programs that fit a processor are read from the compiled kernel (`machine_code.py`). Bytes are counted by the
formulas of `cost.py`, which also has the model of time, and by those below for the weight gradients. Each chip's rates are
assumed, but for the memory of the H100 and the H200, which was measured elsewhere. The floor is the time for x and y, or dy,
x and dx, to pass through memory once. `--out` writes kernels-model.txt and kernels-model.jsonl.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inspect.static import Case, Launch, Recorded, case, line_of, recorded
from benchmarks.measuring.environment import provenance
from benchmarks.rows.shapes import DTYPES
from lmoe_kernels.backends.triton import cost
from lmoe_kernels.backends.triton.cost import Rates, Traffic
from lmoe_kernels.backends.triton.plans import Chip

TOKENS = (512, 4096, 8192, 65536)


class Device(NamedTuple):
    """A chip with its assumed rates, in bytes a second for all of it."""

    chip: Chip
    memory: float
    l2: float

    def rates(self) -> Rates:
        """The same for each processor."""
        processors = self.chip.processors
        return cost.H100._replace(memory=self.memory / processors, l2=self.l2 / processors)


DEVICES = {
    "H100": Device(Chip("sm_90", 132, 227 << 10), 3.0e12, 6.0e12),
    "H200": Device(Chip("sm_90", 132, 227 << 10), 4.3e12, 6.0e12),
    "A100": Device(Chip("sm_80", 108, 163 << 10), 1.8e12, 4.0e12),
}


def traffic_of(one: Recorded) -> Traffic:
    """What a launch moves; kernels for tokens in groups are not known."""
    return TRAFFIC[one.launch.kernel](one, dict(one.launch.constants))._replace(programs=prod(one.grid))


def _shrink(one: Recorded, constants: dict[str, Any]) -> Traffic:
    rows, parts, tile = one.arguments["rows"], one.arguments["parts"], one.launch.tile
    gate = 0 if one.arguments["gate"] is None else constants["E"]
    return cost.shrink(
        rows.shape[0], rows.shape[1], constants["ER"], gate, tile.T, tile.ER, parts.shape[0], rows.element_size()
    )


def _shrink_mix_fwd(one: Recorded, constants: dict[str, Any]) -> Traffic:
    x, columns, tile = one.arguments["x"], constants["EXPERTS_OF_A"] * constants["R"], one.launch.tile
    gate = 0 if one.arguments["gate"] is None else constants["E"]
    shrink = cost.shrink(x.shape[0], x.shape[1], columns, gate, tile.T, tile.ER, 0, x.element_size())
    return cost.fused(shrink, _mix_fwd(one, constants))


def _one_pass(one: Recorded, constants: dict[str, Any]) -> Traffic:
    y, ER = one.arguments["y"], constants["E"] * constants["R"]
    expand = cost.expand(y.shape[0], y.shape[1], ER, 0, one.launch.tile.T, 1, 1, y.element_size())
    return cost.fused(_shrink_mix_fwd(one, constants), expand)


def _mix_fwd(one: Recorded, constants: dict[str, Any]) -> Traffic:
    u, E, R = one.arguments["u"], constants["E"], constants["R"]
    splits = constants.get("SPLITS", 0)  # none in one kernel with the shrink
    return cost.mix_fwd(u.shape[0], constants["EXPERTS_OF_A"] * R, E * R, E, one.launch.tile.T, splits, u.element_size())


def _mix_bwd(one: Recorded, constants: dict[str, Any]) -> Traffic:
    u, E, R = one.arguments["u"], constants["E"], constants["R"]
    splits = constants.get("SPLITS", 0)
    return cost.mix_bwd(u.shape[0], constants["EXPERTS_OF_A"] * R, E * R, E, one.launch.tile.T, splits, u.element_size())


def _shrink_mix_bwd(one: Recorded, constants: dict[str, Any]) -> Traffic:
    dy, tile = one.arguments["dy"], one.launch.tile
    shrink = cost.shrink(dy.shape[0], dy.shape[1], constants["E"] * constants["R"], 0, tile.T, tile.ER, 0, dy.element_size())
    return cost.fused(shrink, _mix_bwd(one, constants))


def _expand(one: Recorded, constants: dict[str, Any]) -> Traffic:
    out, ER, tile = one.arguments["out"], constants["ER"], one.launch.tile
    gate = 0 if one.arguments["gate"] is None else constants["E"]
    chunks = prod(one.grid) // tile.tiles_of(out.shape[0])
    loads = chunks * (1 if tile.ER >= ER else one.arguments["steps"])
    return cost.expand(out.shape[0], out.shape[1], ER, gate, tile.T, chunks, loads, out.element_size())


def _wgrad(one: Recorded, constants: dict[str, Any]) -> Traffic:
    """Each program loads its features of the rows, and the coefficients."""
    rows, of_gate = one.arguments["rows"], one.arguments["gate_coefficients"] is not None
    of_features, of_columns, splits = one.grid
    columns = constants["ER"] + (constants["E"] if of_gate else 0)
    T, F, size = *rows.shape, rows.element_size()
    stored = one.arguments["parts"].nbytes + (one.arguments["gate_parts"].nbytes if of_gate else 0)
    kept = splits > 1 and stored <= cost.KEPT
    return Traffic(0, T * (F * of_columns + columns * of_features) * size, stored, T * F * size + (0 if kept else stored))


def _reduce(one: Recorded, constants: dict[str, Any]) -> Traffic:
    parts, out = one.arguments["parts"], one.arguments["out"]
    return Traffic(0, parts.nbytes, out.nbytes, out.nbytes + (parts.nbytes if parts.nbytes > cost.KEPT else 0))


TRAFFIC: dict[str, Callable[[Recorded, dict[str, Any]], Traffic]] = {
    "_shrink_fwd_kernel": _shrink,
    "_shrink_mix_fwd_kernel": _shrink_mix_fwd,
    "_one_pass_fwd_kernel": _one_pass,
    "_mix_fwd_kernel": _mix_fwd,
    "_mix_bwd_kernel": _mix_bwd,
    "_shrink_mix_bwd_kernel": _shrink_mix_bwd,
    "_expand_fwd_kernel": _expand,
    "_wgrad_bwd_kernel": _wgrad,
    "_reduce_bwd_kernel": _reduce,
}


@cache
def figures_of(launch: Launch, arch: str) -> dict[str, Any]:
    """What can be read from the machine code of a launch, which is compiled once."""
    return line_of(launch, arch)


def lines_of(one: Case, name: str) -> Iterator[dict[str, Any]]:
    """A line for each launch of a forward and a backward."""
    device, direction = DEVICES[name], "forward"
    for launched in recorded(one, device.chip):
        figures, traffic = figures_of(launched.launch, device.chip.arch), traffic_of(launched)
        traffic = traffic._replace(slots=max(1, figures["programs"]))
        yield {
            "device": name, "T": one.shape.tokens, "direction": direction, "kernel": launched.launch.kernel,
            "tile": asdict(launched.launch.tile), "grid": launched.grid,
            **{key: figures[key] for key in ("regs", "loop", "loop_mma", "serialised", "programs")},
            "l2_bytes": traffic.loaded + traffic.stored, "memory_bytes": traffic.memory,
            "model_us": 1e6 * traffic.seconds(device.chip.processors, device.rates()),
        }  # fmt: skip
        if launched.launch.kernel in ("_one_pass_fwd_kernel", "_expand_fwd_kernel"):
            direction = "backward"  # what follows the kernel that writes y


def floor_us(one: Case, name: str, direction: str) -> float:
    """x and y, or dy, x and dx, through memory once."""
    T, I, O, *_ = one.shape.sizes  # noqa: E741
    features = I + O if direction == "forward" else O + 2 * I
    return 1e6 * features * T * DTYPES[one.shape.dtype].itemsize / DEVICES[name].memory


COLUMNS: dict[str, tuple[int, Callable[[dict[str, Any]], object]]] = {  # the width and the cell, by the title
    "T F ER": (11, lambda line: "x".join(str(line["tile"][letter]) for letter in ("T", "F", "ER"))),
    "warps": (5, lambda line: line["tile"]["warps"]),
    "stages": (6, lambda line: line["tile"]["stages"]),
    "programs": (8, lambda line: prod(line["grid"])),
    "at once": (7, lambda line: line["programs"]),  # on a processor
    "regs": (4, lambda line: line["regs"]),
    "loop": (4, lambda line: line["loop"]),
    "mma": (4, lambda line: line["loop_mma"]),
    "serial": (6, lambda line: "yes" if line["serialised"] else "no"),
    "L2 MB": (7, lambda line: f"{line['l2_bytes'] / 1e6:.1f}"),
    "memory MB": (9, lambda line: f"{line['memory_bytes'] / 1e6:.1f}"),
    "us": (6, lambda line: f"{line['model_us']:.1f}"),
}


def table(one: Case, name: str, found: list[dict[str, Any]]) -> str:
    """The lines of one call, with sums and the share of the floor."""
    titles = "".join(f" {title:>{width}}" for title, (width, _) in COLUMNS.items())
    lines = [f"{name}, T={one.shape.tokens}", f"{'':<33}{titles}"]
    for direction in ("forward", "backward"):
        of_one = [line for line in found if line["direction"] == direction]
        for line in of_one:
            cells = "".join(f" {cell(line):>{width}}" for width, cell in COLUMNS.values())
            lines.append(f"{direction:<9} {line['kernel']:<23}{cells}")
        least, total = floor_us(one, name, direction), sum(line["model_us"] for line in of_one)
        lines.append(f"{direction}: modelled {total:.0f} us, floor {least:.0f} us, {100 * least / total:.0f} %")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each device and number of tokens."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspect.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    texts, found = [f"A MODEL, nothing was timed; compiled {provenance()}; E=8 R=16, 4096 x 4096, bf16"], []
    for name in args.chip:
        rates = DEVICES[name]
        texts.append(f"{name}: assumed {rates.memory / 1e12:.1f} TB/s from memory, {rates.l2 / 1e12:.1f} TB/s from the L2")
        for tokens in args.tokens:
            one = case(T=tokens)
            lines = list(lines_of(one, name))
            found += lines
            texts.append(table(one, name, lines))
            print(f"{texts[-1]}\n", flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels-model.txt").write_text("\n\n".join(texts) + "\n")
        (args.out / "kernels-model.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))


if __name__ == "__main__":
    main()
