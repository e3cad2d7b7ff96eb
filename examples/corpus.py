"""Kinds of real text that every CPython installation carries, as bytes: English, Python, C, and bytecode.

English is the language reference of `pydoc_data.topics`, Python the standard library's modules, C the interpreter's headers.
Bytecode is the listings that `dis` prints of some of those modules: they depend on the version of Python.
Each domain is split by document: every eighth document goes to the validation part, so no file is in both parts.
"""

import dis
import io
import pydoc_data.topics
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 8  # one document of this many is for validation
LISTINGS = 64  # modules whose bytecode is listed
LONGEST = 60_000  # bytes of a listing that are kept


@dataclass(frozen=True)
class Domain:
    """The bytes of one kind of text, uint8."""

    name: str
    train: Tensor
    validation: Tensor

    def batch(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """`count` random windows of the training part, (count, length + 1) int64."""
        starts = torch.randint(len(self.train) - length, (count,), generator=generator)
        return torch.stack([self.train[s : s + length + 1] for s in starts]).long()

    def windows(self, count: int, length: int) -> Tensor:
        """The same `count` windows at every call, spread evenly over the validation part, (count, length + 1) int64."""
        starts = torch.linspace(0, len(self.validation) - length - 1, count).long()
        return torch.stack([self.validation[s : s + length + 1] for s in starts]).long()


def load_domains() -> list[Domain]:
    """English, Python and C.

    Raises:
        FileNotFoundError: the installation lacks its sources or headers (on some systems a package of their own).
    """
    topics = [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())]
    modules = _read(Path(sysconfig.get_path("stdlib")), "*.py")
    headers = _read(Path(sysconfig.get_path("include")), "**/*.h")
    return [_split("English", topics), _split("Python", modules), _split("C", headers)]


def load_bytecode() -> Domain:
    """The listings of the standard library's bytecode.

    What differs from run to run is left out: the addresses of objects, and the members of sets, whose order is random.

    Raises:
        FileNotFoundError: the installation lacks the library's sources.
    """
    sources = _read(Path(sysconfig.get_path("stdlib")), "*.py")[:LISTINGS]
    return _split("Bytecode", [_listing(source) for source in sources])


def _listing(source: bytes) -> bytes:
    text = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of escapes in old modules
        dis.dis(compile(source, "module.py", "exec"), file=text)
    return re.sub(r" at 0x[0-9a-fA-F]+|(?<=frozenset)\(\{.*\}\)", "", text.getvalue())[:LONGEST].encode()


def _read(folder: Path, pattern: str) -> list[bytes]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"corpus: {folder} must hold {pattern}, which this Python installation lacks")
    return [file.read_bytes() for file in files]


def _split(name: str, documents: list[bytes]) -> Domain:
    validation = documents[VALIDATION_SHARE - 1 :: VALIDATION_SHARE]
    train = [d for i, d in enumerate(documents) if i % VALIDATION_SHARE != VALIDATION_SHARE - 1]
    return Domain(name, *(torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in (train, validation)))
