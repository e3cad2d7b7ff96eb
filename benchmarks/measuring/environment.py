"""What must accompany a result: device, versions, date, commit, and how busy the machine was."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")


def describe(device: torch.device) -> dict[str, object]:
    """Facts about machine and software, none of which names a host, a user or a path."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY", "").lower() or None,  # idle threads of OpenMP: spin or sleep
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def provenance() -> str:
    """Date, commit and versions, for results that do not depend on a device."""
    facts = describe(torch.device("cpu"))
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton"))
    return f"{facts['date']}, commit {facts['commit']}, {versions}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of this checkout, marked where files differ from it; "unknown" outside git."""
    folder = Path(__file__).parents[1]
    try:
        head = _git("rev-parse", "--short", "HEAD", folder=folder)
        changed = _git("status", "--porcelain", "--", "../lmoe_kernels", "*.py", folder=folder)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}, with changes" if changed else head


def _git(*arguments: str, folder: Path) -> str:
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
