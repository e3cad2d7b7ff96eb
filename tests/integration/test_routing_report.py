"""Files, text by expert and the report of `lmoe_kernels.routing`."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lmoe_kernels import LMoELinear, collect_router_logits, lmoe_layers
from lmoe_kernels.routing import RoutingStats, TextRouting, __main__, load_stats, routing_of_text, show, sums, write_report
from lmoe_kernels.routing.pictures import short_names
from tests.models import llama, with_experts

ROOT = Path(__file__).parents[2]


def letters(numbers: list[int]) -> str:
    return "".join(chr(97 + number) for number in numbers)


def counted(**options: Any) -> RoutingStats:
    model = with_experts(llama(), gate_init_std=2.0, **options)
    with RoutingStats(model, labels=["<a>", "b"]) as stats, torch.no_grad():
        for step, label in enumerate(["<a>", "b", "b"]):
            with stats.label(label):
                model(torch.randint(32, (2, 9)))
            stats.snapshot(step)
    text = TextRouting("Text & <title>", "a layer", ["0", "1", "<2>"], ["<b>", "&", "\n"], [0, 2, 2], [0.5, 0.75, 1.0])
    stats.texts.append(text)
    return stats


class Page(HTMLParser):
    """Reads a page: its text, its elements, and which are open at the end."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_files_give_the_same_statistics(tmp_path: Path) -> None:
    stats = counted()
    stats.save(tmp_path / "new" / "folder")
    read = load_stats(tmp_path / "new" / "folder")
    assert read.summary() == stats.summary()
    assert read.drift() == stats.sums().drift()
    assert (read.labels, read.texts) == (["<a>", "b"], stats.texts)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["routing.json", "routing.safetensors"]
    readable = json.loads((tmp_path / "new" / "folder" / "routing.json").read_text(encoding="utf-8"))
    assert readable["summary"] == stats.summary()


def test_a_failed_save_leaves_the_files_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = counted()
    stats.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stats.texts.clear()
    write_text = Path.write_text

    def full(path: Path, *args: Any, **keywords: Any) -> int:
        write_text(path, "{", encoding="utf-8")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        stats.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def damaged(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], folder: Path) -> Path:
    """Statistics whose configuration or tensors were changed."""
    counted().save(folder)
    tensors, metadata = sums.read_tensors("test", folder / sums.TENSORS)
    config = json.loads(metadata["routing"])
    change(config, tensors)
    save_file(tensors, folder / sums.TENSORS, metadata={"routing": json.dumps(config)})
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, t: c.update(format="other"), "have format 'lmoe_kernels.routing', version 1, got"),
        (lambda c, t: c.update(version=2), "have format 'lmoe_kernels.routing', version 1, got"),
        (lambda c, t: c.pop("layers"), r"hold routing statistics, got KeyError\('layers'\)"),
        (lambda c, t: c.update(layers=[1]), "hold routing statistics, got"),
        (lambda c, t: t.pop("sums.model.layers.0.self_attn.q_proj"), "hold routing statistics, got"),
        (lambda c, t: c.update(texts=[{"title": ""}]), "hold routing statistics, got"),
        (
            lambda c, t: c["labels"].append("c"),
            r"hold sums of shape \(4, 8\) for 'model.layers.0.self_attn.q_proj', got \(3, 8\)",
        ),
    ],
)
def test_damaged_files_are_refused_with_one_line(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^load_stats: \S+routing.safetensors must {message}[^\n]*$"):
        load_stats(damaged(change, tmp_path))


def test_files_of_another_kind_are_refused_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^load_stats: \S+ does not exist: RoutingStats.save writes it$"):
        load_stats(tmp_path)
    (tmp_path / sums.TENSORS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"^load_stats: \S+ must be a safetensors file, got [^\n]*$"):
        load_stats(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / sums.TENSORS)
    with pytest.raises(ValueError, match=r"must hold routing statistics, got a safetensors file of another kind$"):
        load_stats(tmp_path)


@pytest.mark.parametrize("top_k", [None, 1])
def test_text_has_the_strongest_expert_of_each_token(top_k: int | None) -> None:
    model = with_experts(llama(), gate_init_std=2.0, top_k=top_k, renormalize=top_k is None)
    ids = torch.randint(26, (7,))
    found = routing_of_text(model, ids, letters, layer="model.layers.1.mlp.down_proj", title="T")
    mean = routing_of_text(model, ids[None], letters)
    assert not any(layer.output_router_logits or layer.kept_router_logits() for layer in lmoe_layers(model).values())
    for layer in lmoe_layers(model).values():
        layer.output_router_logits = True
    with torch.no_grad():
        model(ids[None])
        gates = {name: logits[0].softmax(dim=-1) for name, logits in collect_router_logits(model).items()}
    of_layer = gates["model.layers.1.mlp.down_proj"]
    assert found.title == "T"
    assert "".join(found.tokens) == letters(ids.tolist())
    assert found.chosen == of_layer.argmax(dim=-1).tolist()
    assert found.gates == pytest.approx(of_layer.amax(dim=-1).tolist() if top_k is None else [1.0] * 7)
    if top_k is None:
        assert mean.chosen == torch.stack(list(gates.values())).mean(dim=0).argmax(dim=-1).tolist()
    assert mean.layer == "mean over 4 layers"


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return letters(ids)


def test_text_takes_a_tokenizer_and_refuses_mistakes_with_one_line() -> None:
    model, ids = with_experts(llama()), torch.randint(26, (7,))
    assert "".join(routing_of_text(model, ids, Tokenizer()).tokens) == letters(ids.tolist())
    for arguments, keywords, error, message in (
        ((model, ids, 3), {}, TypeError, "decode must be a tokenizer or a function, got int"),
        ((model, ids.repeat(2, 1), letters), {}, ValueError, "ids must have shape (S) or (1, S), got (2, 7)"),
        ((model, ids[:0], letters), {}, ValueError, "ids must have shape (S) or (1, S), got (0,)"),
        ((llama(), ids, letters), {}, ValueError, "model must have layers with experts, got none"),
        ((model, ids, letters), {"adapter": "x"}, ValueError, "adapter must run in the forward of the model, got 'x'"),
    ):
        with pytest.raises(error) as caught:
            routing_of_text(*arguments, **keywords)
        assert str(caught.value) == f"routing_of_text: {message}"
    with pytest.raises(
        ValueError, match=r"^routing_of_text: layer must name a layer with experts \(nearest: .*\), got 'q'$"
    ):
        routing_of_text(model, ids, letters, layer="q")
    first = lmoe_layers(model)["model.layers.0.self_attn.q_proj"]
    model.model.layers[0].self_attn.q_proj = LMoELinear.from_linear(first.frozen_layer, num_experts=4, rank=2)
    with pytest.raises(ValueError, match=r"^routing_of_text: layer must be given if layers differ in .*, got None$"):
        routing_of_text(model, ids, letters)


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    write_report(counted(), tmp_path / "new" / "report.html", title="A <title>")
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    assert [text for text in page.texts if text == "A <title>"] == ["A <title>"] * 2
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        for name, value in attributes.items():
            if name.removeprefix("xlink:") in ("src", "href"):
                assert value is not None
                assert value.startswith(("#", "data:")), value
    assert not re.search(r"url\((?!#)|@import", html)
    assert "prefers-color-scheme: dark" in html
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 5
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    assert "#010203" not in html
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    defined = [
        name
        for name in ids
        if not re.match(r"(figure|axes|patch|matplotlib|text|line2d|xtick|ytick|legend|Path|Quad)", name or "")
    ]
    assert len(set(defined)) == len(defined), "pictures share ids, so one would use the shapes of another"


def test_tokens_are_escaped_and_say_their_expert_without_colour() -> None:
    html = show(counted())._repr_html_()
    assert "<title>" not in html
    assert "Text &amp; &lt;title&gt;" in html
    spans = re.findall(r'(?:<sub>(\d)</sub>)?<span class="t" style="([^"]*)" title="([^"]*)">([^<]*)</span>', html)
    assert [(number, tip, text) for number, _, tip, text in spans] == [
        ("0", "expert 0, gate 0.50", "&lt;b&gt;"),
        ("2", "expert &lt;2&gt;, gate 0.75", "&amp;"),
        ("", "expert &lt;2&gt;, gate 1.00", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"),
    ]
    assert [re.search(r"--g:([\d.]+)", style)[1] for _, style, *_ in spans] == ["0.20", "0.60", "1.00"]
    assert "&lt;a&gt;" in html


@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_little_to_show_is_shown(labels: list[str] | None) -> None:
    """Layers with different experts, of one or many; no labels, or tokens of one alone; no text and no snapshots."""
    model = nn.Sequential(*(LMoELinear(4, 4, num_experts=experts, rank=1) for experts in (1, 3, 20)))
    with RoutingStats(model, labels=labels) as stats:
        if labels:
            with stats.label("a"):
                model(torch.randn(5, 4))
        model(torch.randn(5, 4))
    page = Page(show(stats).html)
    assert not page.open
    assert sum(tag == "svg" for tag, _ in page.elements) == 2


def test_what_cannot_be_shown_is_refused_with_one_line() -> None:
    with pytest.raises(TypeError, match=r"^show: stats must be a RoutingStats or what load_stats returns, got int$"):
        show(3)
    with pytest.raises(ValueError, match=r"^RoutingStats: model must have run since [^\n]*$"):
        show(RoutingStats(with_experts(llama())))


def test_matplotlib_is_needed_for_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = counted()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert stats.summary()
    with pytest.raises(ImportError, match=r"^show: matplotlib must be installed: pip install matplotlib$"):
        show(stats)
    heavy = ("matplotlib", "transformers", "peft", "safetensors")
    program = f"import sys; from lmoe_kernels import routing; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted().save(tmp_path)
    assert __main__.main(["report", str(tmp_path)]) == 0
    assert __main__.main(["report", str(tmp_path), "--out", str(tmp_path / "other.html"), "--title", "Other"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {tmp_path / 'report.html'}"
    assert "<title>Other</title>" in (tmp_path / "other.html").read_text(encoding="utf-8")


def test_the_command_says_in_one_line_that_there_are_no_statistics(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmoe_kernels.routing", "report", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    path = tmp_path / "routing.safetensors"
    assert run.stderr == f"load_stats: {path} does not exist: RoutingStats.save writes it\n"
    assert not list(tmp_path.iterdir())


def test_short_names_leave_out_what_all_have_in_common() -> None:
    assert short_names(["model.layers.0.q", "model.layers.1.q"]) == ["0.q", "1.q"]
    assert short_names(["model.q"]) == ["model.q"]
    assert short_names(["a.b", "a"]) == ["a.b", "a"]
