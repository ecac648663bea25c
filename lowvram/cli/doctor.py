"""`lowvram-demo doctor`: devices, packages, memory, and a checkpoint against its own config."""

from __future__ import annotations

import platform
import re
from argparse import Namespace
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from lowvram.cli.output import Console, print_json
from lowvram.errors import CheckpointError, LowVRAMError

if TYPE_CHECKING:
    from lowvram.checkpoint import Checkpoint, Difference
    from lowvram.offload import DeviceInfo

DISTRIBUTION = "lowvram-omni"

NATIVE = ("av", "soundfile", "soxr", "tokenizers")
"""Packages around a compiled library, which may be installed and still not load; quick to try."""

_REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;]*)(;.*)?")
_BOUND = re.compile(r"(>=|<|==)\s*([\d.]+)")


@dataclass(frozen=True)
class Package:
    """A needed package: the version found (None: not installed), what is wanted, what is wrong."""

    name: str
    version: str | None
    wanted: str
    problem: str | None


def main(args: Namespace, console: Console) -> int:
    found = [examine(name, wanted) for name, wanted in requirements()]
    ill = [package for package in found if package.problem]
    present, default = _devices()
    state = {
        "version": metadata.version(DISTRIBUTION),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [asdict(device) for device in present],
        "default_device": default,
        "packages": [asdict(package) for package in found],
    }
    if not args.json:
        print(_machine(state, present, found))
    # Without the packages the checkpoint cannot be read either.
    checkpoint = None if ill else _open(args)
    differences = checkpoint.check() if checkpoint else []
    if args.json:
        print_json(state | {"model": _model(checkpoint, differences)})
    elif checkpoint:
        print(f"\n{_described(checkpoint)}", *differences, sep="\n  ")
    if ill:
        problems = "; ".join(f"{package.name} {package.problem}" for package in ill)
        names = " ".join(f"'{package.name}{package.wanted}'" for package in ill)
        raise LowVRAMError(f"{problems}: pip install --upgrade {names}")
    if harmful := [difference for difference in differences if difference.harmful]:
        raise CheckpointError(
            f"{args.model}: its files differ from what its config.json asks for in {len(harmful)} "
            "places that matter; download it again, or use another"
        )
    return 0


def requirements() -> list[tuple[str, str]]:
    """The packages that this one needs, with their ranges, as its own metadata states them."""
    found = []
    for line in metadata.requires(DISTRIBUTION) or []:
        if (match := _REQUIREMENT.match(line)) and "extra ==" not in line:
            found.append((match[1], match[2].strip()))
    return sorted(found)


def examine(name: str, wanted: str) -> Package:
    """Whether a package is here, in range and, for a few, able to load."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, wanted, "is not installed")
    problem = None if in_range(version, wanted) else f"{version} is not {wanted}"
    if problem is None and name in NATIVE:
        try:
            import_module(name)
        except Exception as error:
            problem = f"is installed and does not load ({error})"
    return Package(name, version, wanted, problem)


def in_range(version: str, wanted: str) -> bool:
    """Whether the leading numbers of `version` satisfy `wanted`, as in `>=5.17,<6`."""
    have = _numbers(version)
    for relation, bound in _BOUND.findall(wanted):
        limit = _numbers(bound)
        good = {">=": have >= limit, "<": have < limit, "==": have == limit}
        if not good[relation]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of `2.13.0+cpu`: trailing zeros do not count."""
    numbers = [int(n) for n in re.match(r"[\d.]*", version)[0].split(".") if n]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _devices() -> tuple[tuple[DeviceInfo, ...], str | None]:
    """The devices and the default one; none where the package that finds them is missing."""
    try:
        from lowvram.offload import default_device, devices
    except ImportError:
        return (), None
    return devices(), default_device()


def _open(args: Namespace) -> Checkpoint:
    from lowvram.checkpoint import resolve

    return resolve(args.model, offline=args.offline)


def _machine(state: dict[str, Any], present: tuple[DeviceInfo, ...], found: list[Package]) -> str:
    """The state as a page of text."""
    lines = [
        f"{DISTRIBUTION} {state['version']}, Python {state['python']}, {state['platform']}",
        "",
        "devices",
    ]
    lines += [_device_row(device) for device in present]
    lines += [f"  auto is {state['default_device']}", "", "packages"]
    for package in found:
        row = f"  {package.name:16} {package.version or '-':14} {package.wanted}"
        lines.append(f"{row}  <- {package.problem}" if package.problem else row.rstrip())
    return "\n".join(lines)


def _device_row(device: DeviceInfo) -> str:
    from lowvram.offload import format_size

    sizes = (device.total_bytes, device.free_bytes)
    total, free = ("?" if size is None else format_size(size) for size in sizes)
    return f"  {device.name:8} {total:>10}, {free:>10} free  {device.note}".rstrip()


def _model(checkpoint: Checkpoint | None, differences: list[Difference]) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    return {
        "name": checkpoint.name,
        "folder": str(checkpoint.folder),
        "dtype": checkpoint.stored_dtype,
        "voices": _voices(checkpoint),
        "differences": [asdict(difference) for difference in differences],
    }


def _described(checkpoint: Checkpoint) -> str:
    quant = checkpoint.config.quant
    form = f"AWQ {quant.bits} bits" if quant else checkpoint.stored_dtype
    voices = ", ".join(_voices(checkpoint)) or "none"
    return f"model {checkpoint.name} ({checkpoint.folder})\n  {form}; voices: {voices}"


def _voices(checkpoint: Checkpoint) -> list[str]:
    """The voices by name; none where the file is damaged, which is one of the differences."""
    try:
        return list(checkpoint.voices) if checkpoint.config.speaks else []
    except CheckpointError:
        return []
