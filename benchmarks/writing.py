"""How a result is written, on what it was measured, and with what."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from offramp.files import replaced

__all__ = ["processor", "trained_on", "versions", "write_result"]


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, all of it or nothing."""
    with replaced(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")


# By the names that the system has for them, the widest first.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}


def processor() -> str:
    """Its name, as well as the system knows it, and the width of its vectors, which times tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    known = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = known.get("model name") or platform.processor() or platform.machine()
    flags = set(known.get("flags", "").split())
    return ", ".join([name, *[title for flag, title in VECTORS.items() if flag in flags][:1]])


def trained_on() -> str:
    """The device that ``fit`` trains on by itself."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
