"""How much memory the host has for this process: the machine, its cgroup, and `ulimit`.

In a container the machine's own figures are those of the whole host, so the limits of the control
group (version 1 or 2) are read as well, file pages that can be dropped counted as free.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60  # version 1 writes a huge number where there is no limit
# (folder below /sys/fs/cgroup, limit, use, prefix of the totals in memory.stat) by version
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("", "memory.max", "memory.current", "")


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) bytes of host memory for this process. `root` holds `proc` and `sys`."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, limit - used)
    for limit, used in _process_limits():
        available = min(available, limit - used)
    return total, max(0, available)


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be dropped) of every control group this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            layout = _V2
        elif "memory" in controllers.split(","):
            layout = _V1
        else:
            continue
        top = root / "sys/fs/cgroup" / layout[0]
        folder = top / path.lstrip("/")
        # A limit set on any parent holds too; inside a container the path may not exist at all.
        folders = [folder, *folder.parents]
        found += [_limit(f, layout) for f in folders if f == top or top in f.parents]
    return [pair for pair in found if pair is not None]


def _limit(folder: Path, layout: tuple[str, str, str, str]) -> tuple[int, int] | None:
    _, limit_file, used_file, prefix = layout
    try:
        limit = int((folder / limit_file).read_text())
        used = int((folder / used_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = sum(int(stat.get(f"{prefix}{k}_file", 0)) for k in ("inactive", "active"))
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return (limit, max(0, used - droppable)) if limit < _UNLIMITED else None


def _process_limits() -> list[tuple[int, int]]:
    """(limit, use) of the address space and of private data, where `ulimit` bounds them."""
    if os.name != "posix":
        return []
    import resource

    memory = psutil.Process().memory_info()
    uses = {"RLIMIT_AS": memory.vms, "RLIMIT_DATA": getattr(memory, "data", memory.rss)}
    limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in uses}
    return [(n, uses[name]) for name, n in limits.items() if n != resource.RLIM_INFINITY]


def resident_bytes() -> int:
    """The resident set of this process."""
    return int(psutil.Process().memory_info().rss)
