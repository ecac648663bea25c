"""Finding devices through the drivers' tools, and the limits of host memory."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowvram.errors import UsageError
from lowvram.offload import default_device, devices, parse_device
from lowvram.offload import host as host_module
from lowvram.offload import probe as probe_module

MIB = 1 << 20

NVIDIA = """\
GPU-aaaa1111, NVIDIA GeForce RTX 3060, 12288, 11000
GPU-bbbb2222, NVIDIA GeForce RTX 4090, 24564, [N/A]
"""

# Columns as npu-smi 24 prints them; the rows of a second table must not be taken for devices.
NPU = """\
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 86.0        40                0    / 0             |
| 0                         | 0000:00:00.0  | 0           0    / 0          2828 / 32768         |
+===========================+===============+====================================================+
| 1     910B4               | OK            | 86.0        40                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          2768/ 32768          |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       0                 | 171273        | python                   | 489                     |
"""


class Tools:
    """Stands in for the drivers' tools: what each prints, or the error it ends with."""

    def __init__(self) -> None:
        self.prints: dict[str, str | Exception | int] = {}

    def which(self, tool: str) -> str | None:
        return f"/opt/{tool}" if tool in self.prints else None

    def run(self, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        assert kwargs["timeout"] > 0
        answer = self.prints[Path(command[0]).name]
        if isinstance(answer, Exception):
            raise answer
        code, text = (answer, NVIDIA) if isinstance(answer, int) else (0, answer)
        return subprocess.CompletedProcess(command, code, text, "")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    found = Tools()
    monkeypatch.setattr(probe_module.shutil, "which", found.which)
    monkeypatch.setattr(probe_module.subprocess, "run", found.run)
    monkeypatch.setattr(probe_module.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(probe_module, "npu_installed", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def test_the_host_alone_where_there_are_no_tools(tools: Tools) -> None:
    (host,) = devices()
    assert host.name == "cpu"
    assert host.usable
    assert 0 < (host.free_bytes or 0) < (host.total_bytes or 0) <= psutil.virtual_memory().total
    assert default_device() == "cpu"


def test_cards_are_read_from_nvidia_smi(tools: Tools) -> None:
    tools.prints["nvidia-smi"] = NVIDIA
    first, second, host = devices()
    assert (first.name, first.total_bytes, first.free_bytes) == (
        "cuda:0",
        12288 * MIB,
        11000 * MIB,
    )
    assert "RTX 3060" in first.note
    assert (second.name, second.free_bytes) == ("cuda:1", None)
    assert host.name == "cpu"
    assert default_device() == "cuda"


@pytest.mark.parametrize(
    ("visible", "notes"),
    [
        ("", []),
        ("-1", []),
        ("1", ["RTX 4090"]),
        ("1,0", ["RTX 4090", "RTX 3060"]),
        ("GPU-aaaa", ["RTX 3060"]),
        ("1,9,0", ["RTX 4090"]),
    ],
)
def test_cuda_visible_devices_is_respected(
    tools: Tools, monkeypatch: pytest.MonkeyPatch, visible: str, notes: list[str]
) -> None:
    tools.prints["nvidia-smi"] = NVIDIA
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cards = devices()[:-1]
    assert [card.name for card in cards] == [f"cuda:{i}" for i in range(len(notes))]
    assert all(note in card.note for card, note in zip(cards, notes, strict=True))


@pytest.mark.parametrize("answer", [subprocess.TimeoutExpired("x", 5), OSError("x"), 9])
def test_a_tool_that_fails_is_no_device(tools: Tools, answer: Exception | int) -> None:
    tools.prints["nvidia-smi"] = tools.prints["npu-smi"] = answer
    assert [d.name for d in devices()] == ["cpu"]


def test_a_card_that_torch_cannot_drive_says_so(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.prints["nvidia-smi"] = NVIDIA
    monkeypatch.setattr(probe_module.metadata, "version", lambda name: "2.13.0+cpu")
    card = devices()[0]
    assert not card.usable
    assert "without CUDA" in card.note
    assert default_device() == "cpu"


def test_npus_are_read_from_npu_smi(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.prints["npu-smi"] = NPU
    first, second, _ = devices()
    assert (first.name, first.total_bytes, first.free_bytes) == (
        "npu:0",
        32768 * MIB,
        (32768 - 2828) * MIB,
    )
    assert second.free_bytes == (32768 - 2768) * MIB
    assert not first.usable
    assert "torch_npu is not installed" in first.note
    assert default_device() == "cpu"
    monkeypatch.setattr(probe_module, "npu_installed", lambda: True)
    assert devices()[0].note == "Ascend 910B4"
    assert default_device() == "npu"


@pytest.mark.parametrize(
    ("name", "parsed"),
    [("cpu", ("cpu", 0)), ("meta", ("meta", 0)), ("cuda", ("cuda", 0)), ("npu:12", ("npu", 12))],
)
def test_device_names(name: str, parsed: tuple[str, int]) -> None:
    assert parse_device(name) == parsed


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:0:1", "CPU", "cpu:1", "٣"])
def test_an_unknown_device_lists_the_known(name: str) -> None:
    with pytest.raises(UsageError, match="auto, cuda or cuda:INDEX, npu or npu:INDEX, cpu, meta"):
        parse_device(name)


def test_torch_npu_is_not_loaded_by_torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    monkeypatch.setattr(probe_module, "npu_installed", lambda: False)
    probe_module.defer_npu_autoload()
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in probe_module.os.environ
    monkeypatch.setattr(probe_module, "npu_installed", lambda: True)
    probe_module.defer_npu_autoload()
    assert probe_module.os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    probe_module.defer_npu_autoload()
    assert probe_module.os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {  # version 2: the limit of a parent holds for the group
            "proc/self/cgroup": "0::/box/job\n",
            "sys/fs/cgroup/box/job/memory.max": "max\n",
            "sys/fs/cgroup/box/memory.max": f"{100 * MIB}\n",
            "sys/fs/cgroup/box/memory.current": f"{70 * MIB}\n",
            "sys/fs/cgroup/box/memory.stat": f"inactive_file {20 * MIB}\nactive_file {10 * MIB}\n",
        },
        {  # version 1 inside a container: the host's path does not exist here
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n9:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{100 * MIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{70 * MIB}\n",
            "sys/fs/cgroup/memory/memory.stat": (
                f"total_inactive_file {20 * MIB}\ntotal_active_file {10 * MIB}\n"
            ),
        },
    ],
)
def test_a_container_s_limit_counts_and_its_file_pages_do_not(
    tmp_path: Path, files: dict[str, str]
) -> None:
    write(tmp_path, files)
    assert host_module.host_memory(tmp_path) == (100 * MIB, 60 * MIB)


def test_no_limit_leaves_the_machine_s_own_figures(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n9:memory:/\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/memory/memory.stat": "\n",
        },
    )
    assert host_module.host_memory(tmp_path)[0] == psutil.virtual_memory().total
    assert host_module.host_memory(tmp_path / "nothing")[0] == psutil.virtual_memory().total


def test_a_process_limit_bounds_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_process_limits", lambda: [(50 * MIB, 20 * MIB)])
    assert host_module.host_memory()[1] == 30 * MIB
    monkeypatch.setattr(host_module, "_process_limits", lambda: [(50 * MIB, 60 * MIB)])
    assert host_module.host_memory()[1] == 0
