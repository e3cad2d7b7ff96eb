"""Pictures of a run, drawn from its JSON: cost over T, bars against the peers, cost over E, memory."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows.shapes import timed_backends
from benchmarks.showing.report import Results

# Okabe and Ito's palette, which can be distinguished with any colour vision.
OTHERS = {
    "frozen": ("frozen linear", "#555555"), "peft": ("PEFT, one LoRA", "#E69F00"),
    "loop": ("loop over the experts", "#D55E00"), "eager": ("factored, eager", "#CC79A7"),
}  # fmt: skip
OF_BACKEND = {"torch": "#0072B2", "triton": "#009E73", "cuda": "#000000"}
FURTHER_BACKEND = "#56B4E9"
PEER, LIMIT = "#A9B4BD", "#888888"
Record = dict[str, Any]


def drawn_rows() -> dict[str, tuple[str, str]]:
    """The rows that have a line of their own, with name and colour; a backend that has no colour here gets a common one."""
    ours = {name: (f"ours, {name}", OF_BACKEND.get(name, FURTHER_BACKEND)) for name in timed_backends()}
    return OTHERS | ours


def draw(results: Results, folder: Path) -> list[Path]:
    """Every picture for which there are rows.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    style: dict[Any, Any] = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
        "axes.titlelocation": "left", "axes.edgecolor": "#666666", "figure.dpi": 130, "savefig.bbox": "tight",
    }  # fmt: skip
    timed: dict[tuple, Record] = {}
    for record in results["records"]:
        if record["seconds"] is not None and record["launch"] == _launch(results):
            timed.setdefault((record["row"], *_fixed(record)), record)  # a row of two tables is drawn as the first has it
    drawn = []
    with matplotlib.rc_context(style):
        for name, picture in (("tokens", _tokens), ("peers", _peers), ("experts", _experts), ("memory", _memory)):
            figure = picture([*timed.values()], results["environment"]["device"])
            if figure is not None:
                drawn.append(folder / f"{name}.png")
                figure.savefig(drawn[-1])
    return drawn


def _launch(results: Results) -> str:
    """The replays of CUDA graphs where there are any: these include short calls, whose eager launches measure the host."""
    return "graph" if any(record["launch"] == "graph" for record in results["records"]) else "eager"


def _tokens(records: list[Record], device: str) -> Any:
    """Time a token over T, with the roofline, and the same over the frozen linear's time."""
    layer = [r for r in _layers(records) if r["row"] in drawn_rows()]
    phase = "forward+backward"
    series = _longest(layer, "tokens", phase)
    if series is None:
        return None
    figure, (left, right) = _axes(2, (11, 4.2))
    limits = [r for r in series if r["row"] in timed_backends()]
    floor = sorted({(r["shape"]["tokens"], 1e6 * r["floor_seconds"] / r["shape"]["tokens"]) for r in limits})
    if floor:
        left.plot(*zip(*floor, strict=True), color=LIMIT, linestyle="--", linewidth=1.2)
    ends = [("roofline of L-MoE", LIMIT, floor[-1])] if floor else []
    ends += _lines(left, series, "tokens", lambda r, key: 1e6 * r["seconds"][key] / r["shape"]["tokens"])
    left.set(xscale="log", yscale="log", xlabel="tokens T", title="microseconds a token")
    _name_ends(left, ends)
    ends = _lines(right, series, "tokens", lambda r, key: r["over_frozen"][key])
    right.set(xscale="log", xlabel="tokens T", title="times the frozen linear's time")
    right.set_ylim(0, 1.3 * max(r["over_frozen"]["median"] for r in series))
    right.axhline(1, color="#CCCCCC", linewidth=0.8, zorder=0)
    _name_ends(right, ends)
    for axis in (left, right):
        ticks = sorted({r["shape"]["tokens"] for r in series})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
    figure.suptitle(f"Layer, forward and backward, {_sizes(series[0], 'tokens')} · {device}", x=0.01, ha="left", fontsize=11)
    return figure


def _experts(records: list[Record], device: str) -> Any:
    """The ratio to the frozen linear over E, and that of their rooflines."""
    layer = [r for r in _layers(records) if r["row"] in drawn_rows() and r["row"] != "frozen"]
    series = _longest(layer, "num_experts", "forward+backward")
    if series is None:
        return None
    frozen = next(
        r for r in records if r["row"] == "frozen" and _fixed(r, "num_experts") == _fixed(series[0], "num_experts")
    )
    figure, (axis,) = _axes(1, (7, 4.2))
    limits = [r for r in series if r["row"] in timed_backends()]
    floor = sorted({(r["shape"]["num_experts"], r["floor_seconds"] / frozen["floor_seconds"]) for r in limits})
    if floor:
        axis.plot(*zip(*floor, strict=True), color=LIMIT, linestyle="--", linewidth=1.2)
    ends = [("roofline of L-MoE", LIMIT, floor[-1])] if floor else []
    ends += _lines(axis, series, "num_experts", lambda r, key: r["over_frozen"][key])
    axis.set(
        xscale="log", yscale="log", xlabel="experts E", title="Layer, forward and backward: times the frozen linear's time"
    )
    ticks = sorted({r["shape"]["num_experts"] for r in series})
    axis.set_xticks(ticks, [str(t) for t in ticks])
    _plain_log_ticks(axis.yaxis)
    axis.xaxis.minorticks_off()
    _name_ends(axis, ends)
    figure.suptitle(f"{_sizes(series[0], 'num_experts')} · {device}", x=0.01, ha="left", fontsize=11)
    return figure


def _peers(records: list[Record], device: str) -> Any:
    """The ratio of every row to the frozen linear, at the largest and the smallest T that all kinds of rows have."""
    panels = []
    for which, phase in ((max, "forward+backward"), (min, "forward")):
        for dtype in dict.fromkeys(r["shape"]["dtype"] for r in records):
            group = _widest([r for r in records if r["shape"]["dtype"] == dtype], phase, which)
            if group:
                panels.append((f"{phase.replace('+', ' and ')}, T={group[0]['shape']['tokens']}, {dtype}", group))
    if not panels:
        return None
    sizes = {_sizes(group[0], "tokens", "dtype") for _, group in panels}
    tallest, across = max(len(group) for _, group in panels), min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = _axes(len(panels), (6.2 * across, (0.3 * tallest + 0.9) * down), across)
    for axis, (title, group) in zip(axes, panels, strict=False):
        bars = sorted((r for r in group if r["row"] != "frozen"), key=lambda r: -r["over_frozen"]["median"])
        _bars(axis, bars, lambda r: r["over_frozen"], "{:.2f}")
        axis.axvline(1, color=OTHERS["frozen"][1], linewidth=1)
        axis.set_title(title if len(sizes) == 1 else f"{title}, {_sizes(group[0], 'tokens', 'dtype')}")
    shared = f", {sizes.pop()}" if len(sizes) == 1 else ""
    figure.suptitle(f"Times the frozen linear's time (the line at 1){shared} · {device}", x=0.01, ha="left", fontsize=11)
    return figure


def _memory(records: list[Record], device: str) -> Any:
    """The bytes kept for the backward of a token, and the peak of one forward and backward."""
    group = _widest(records, "forward+backward", max)
    if not group:
        return None
    figure, (left, right) = _axes(2, (12, 0.3 * len(group) + 1.2))
    tokens = group[0]["shape"]["tokens"]
    for axis, title, value in (
        (left, "bytes a token kept for the backward, beyond x", lambda r: r["saved_bytes"] / tokens),
        (right, "MiB at the peak, beyond the inputs", lambda r: r["peak_bytes"] / 2**20),
    ):
        bars = sorted((r for r in group if r["row"] != "frozen"), key=lambda r, v=value: -v(r))
        _bars(axis, bars, lambda r, v=value: dict.fromkeys(("median", "low", "high"), v(r)), "{:,.0f}")
        axis.set_title(title)
    figure.suptitle(f"Memory, forward and backward, {_sizes(group[0])} · {device}", x=0.01, ha="left", fontsize=11)
    return figure


def _bars(axis: Any, records: list[Record], value: Callable[[Record], dict[str, float]], form: str) -> None:
    """Horizontal bars, each followed by its number. A bar much longer than the others is cut, and marked as cut."""
    values = [value(r) for r in records]
    first, second = (*sorted((v["median"] for v in values), reverse=True), 0, 0)[:2]
    end = 1.5 * second if first > 3 * second > 0 else 1.1 * first
    known, ours = drawn_rows(), timed_backends()
    colours = [known[r["row"]][1] if r["row"] in ours else PEER for r in records]
    axis.barh([r["label"] for r in records], [min(v["median"], end) for v in values], color=colours, height=0.7)
    for place, v in enumerate(values):
        if v["high"] > v["low"] and v["median"] < end:
            axis.plot([v["low"], min(v["high"], end)], [place, place], color="#222222", linewidth=1)
        text = form.format(v["median"]) + (" (bar cut)" if v["median"] > end else "")
        at = min(max(v["high"], v["median"]), end)
        axis.annotate(text, (at, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, 1.25 * end or 1)
    axis.spines["bottom"].set_visible(False)  # every bar has its number, so the axis needs none
    axis.tick_params(axis="both", length=0, labelbottom=False)


def _lines(
    axis: Any, series: list[Record], over: str, value: Callable[[Record, str], float]
) -> list[tuple[str, str, tuple[float, float]]]:
    """A line with its band of percentiles for each row; returns name, colour and end of each line."""
    ends = []
    for row, (name, colour) in drawn_rows().items():
        if all(r["row"] != row for r in series):
            continue
        records = sorted((r for r in series if r["row"] == row), key=lambda r: r["shape"][over])
        places = [r["shape"][over] for r in records]
        low, middle, high = ([value(r, key) for r in records] for key in ("low", "median", "high"))
        width = 2.2 if row in timed_backends() else 1.4
        axis.plot(places, middle, color=colour, linewidth=width, marker="o", markersize=3.5)
        axis.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
        ends.append((name, colour, (places[-1], middle[-1])))
    return ends


def _name_ends(axis: Any, ends: Iterable[tuple[str, str, tuple[float, float]]]) -> None:
    """Write each line's name next to its end, moved apart where the names would overlap."""
    axis.figure.canvas.draw()
    height, taken = 14.0, float("-inf")
    scale = 72 / axis.figure.dpi
    for name, colour, point in sorted(ends, key=lambda end: end[2][1]):
        y = axis.transData.transform(point)[1] * scale
        shift = max(0.0, taken + height - y)
        taken = y + shift
        axis.annotate(name, point, (8, shift), textcoords="offset points", color=colour, va="center", fontsize=9)


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _axes(count: int, size: tuple[float, float], across: int | None = None) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    across = across or count
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(-(-count // across), across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes


def _layers(records: list[Record]) -> list[Record]:
    """The records of whole layers that have a ratio to the frozen linear."""
    return [record for record in records if record["scope"] == "layer" and record["over_frozen"] is not None]


def _fixed(record: Record, *but: str) -> tuple:
    """A record's shape, phase and scope without the sizes that vary."""
    sizes = ((key, value) for key, value in record["shape"].items() if key not in but)
    return (*sizes, record["phase"], record["scope"])


def _longest(records: list[Record], over: str, phase: str) -> list[Record] | None:
    """The records among which `over` takes the most values while all else is fixed; None where it takes one value only."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record["phase"] == phase:
            groups.setdefault(_fixed(record, over), []).append(record)
    best = max(groups.values(), key=lambda group: len({r["shape"][over] for r in group}), default=[])
    return best if len({r["shape"][over] for r in best}) > 1 else None


def _widest(records: list[Record], phase: str, which: Callable) -> list[Record]:
    """Of the layer's groups with the most rows, the one with the largest or smallest T."""
    groups: dict[tuple, list[Record]] = {}
    for record in _layers(records):
        if record["phase"] == phase:
            groups.setdefault(_fixed(record), []).append(record)
    most = max((len(group) for group in groups.values()), default=0)
    candidates = [group for group in groups.values() if len(group) >= most - 2]  # a row or two may not run everywhere
    return which(candidates, key=lambda group: group[0]["shape"]["tokens"]) if candidates else []


def _sizes(record: Record, *but: str) -> str:
    """The sizes that are the same throughout a picture."""
    shape = record["shape"]
    parts = {
        "in_features": f"{shape['in_features']} → {shape['out_features']}", "tokens": f"T={shape['tokens']}",
        "num_experts": f"E={shape['num_experts']}", "rank": f"R={shape['rank']}", "dtype": shape["dtype"],
    }  # fmt: skip
    return ", ".join(text for key, text in parts.items() if key not in but)
