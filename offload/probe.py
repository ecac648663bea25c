"""Which devices this machine has, found out without importing torch.

The command line plans, lists devices and checks a device's name before anything heavy is loaded.
What the drivers' own tools print is believed; where a tool is missing or slow there is no device
of that kind here, or one of unknown size.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lowvram.errors import UsageError

from .budget import MIB
from .host import host_memory

TOOL_SECONDS = 5.0  # nvidia-smi takes about a second where the driver is not kept loaded
KINDS = ("cuda", "npu", "cpu", "meta")
_NAME = re.compile(r"(cuda|npu)(?::([0-9]{1,3}))?|cpu|meta")
_BUS_ROW = re.compile(
    r"\|\s*[0-9]+.*\|\s*[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:.*?([0-9]+)\s*/\s*([0-9]+)\s*\|$"
)
_NPU_NAME = re.compile(r"\|\s*[0-9]+\s+(\S+)\s*\|")


@dataclass(frozen=True)
class DeviceInfo:
    """A device of this machine. Sizes in bytes, None where the driver's tool does not say.

    `usable` is False when the installed torch cannot drive it; `note` says why and what to install.
    """

    name: str
    total_bytes: int | None
    free_bytes: int | None
    note: str = ""
    usable: bool = True


def parse_device(name: str) -> tuple[str, int]:
    """(kind, index) of a device name such as "cuda:1"; `UsageError` names the known ones."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError(
            f"unknown device {name[:40]!r}; wanted auto, cuda or cuda:INDEX, npu or npu:INDEX, "
            "cpu, meta (shapes only)"
        )
    return found[1] or name, int(found[2] or 0)


def devices() -> tuple[DeviceInfo, ...]:
    """The accelerators found, the fastest kind first, and the host itself last."""
    total, free = host_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = DeviceInfo("cpu", total, free, f"{cores} cores, host memory")
    return (*_cuda_devices(), *_npu_devices(), host)


def default_device() -> str:
    """The kind that "auto" stands for here: cuda, else npu, else cpu."""
    found = {d.name.split(":")[0] for d in (*_cuda_devices(), *_npu_devices()) if d.usable}
    return next(kind for kind in KINDS if kind in found or kind == "cpu")


def defer_npu_autoload() -> None:
    """Call before the first `import torch`, to keep it from importing an installed torch_npu.

    torch imports every installed back end by itself, and torch_npu without the CANN libraries
    makes `import torch` fail. With the switch off torch_npu is imported when an npu is asked for.
    A value the user has set stays.
    """
    if npu_installed():
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def npu_installed() -> bool:
    """Whether torch_npu is installed; it is not imported."""
    return importlib.util.find_spec("torch_npu") is not None


def cuda_free_bytes(uuid: str) -> int | None:
    """Free memory of one NVIDIA device, without a context of our own; None if it is not known."""
    rows = _output(
        "nvidia-smi", f"--id={uuid}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"
    )
    return _mib(rows[0]) if rows else None


def _cuda_devices() -> list[DeviceInfo]:
    fields = "uuid,name,memory.total,memory.free"
    rows = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    cards = [[cell.strip() for cell in row.split(",")] for row in rows]
    shown = _visible([card for card in cards if len(card) == 4])
    problem = _torch_without_cuda() if shown else ""
    return [
        DeviceInfo(f"cuda:{i}", _mib(total), _mib(free), problem or card, usable=not problem)
        for i, (_, card, total, free) in enumerate(shown)
    ]


def _visible(cards: list[list[str]]) -> list[list[str]]:
    """The cards CUDA_VISIBLE_DEVICES leaves, in its order; an unknown entry ends the list."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return cards
    kept = []
    for entry in (part.strip() for part in chosen.split(",")):
        same = [
            c for i, c in enumerate(cards) if entry and (str(i) == entry or c[0].startswith(entry))
        ]
        if not same:
            break
        kept.append(same[0])
    return kept


def _torch_without_cuda() -> str:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "torch is not installed"
    if version.endswith("+cpu"):
        return f"the installed torch {version} is a build without CUDA; install one with CUDA"
    return ""


def _npu_devices() -> list[DeviceInfo]:
    problem = "" if npu_installed() else "torch_npu is not installed; see the extra 'npu'"
    found: list[DeviceInfo] = []
    card = "Ascend"
    for row in _output("npu-smi", "info"):
        if memory := _BUS_ROW.match(row.strip()):
            used, total = int(memory[1]) * MIB, int(memory[2]) * MIB
            name = f"npu:{len(found)}"
            found.append(DeviceInfo(name, total, total - used, problem or card, usable=not problem))
        elif title := _NPU_NAME.match(row.strip()):
            card = f"Ascend {title[1]}"
    if found:
        return found
    nodes: Iterable[Path] = Path("/dev").glob("davinci[0-9]*")
    return [
        DeviceInfo(f"npu:{i}", None, None, problem or card, usable=not problem)
        for i, _ in enumerate(sorted(nodes))
    ]


def _output(tool: str, *arguments: str) -> list[str]:
    """Lines a driver's tool prints; none where it is missing, slow or fails."""
    path = shutil.which(tool)
    if path is None:
        return []
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.strip().isascii() and text.strip().isdigit() else None
