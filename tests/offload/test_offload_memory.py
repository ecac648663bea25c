"""What is imported when, and that reading a checkpoint takes its size once: in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram import offload

MIB = 1 << 20


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )


def test_sizes_devices_and_headers_need_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    code = """
import sys
from lowvram.offload import Budget, Store, devices, default_device, format_size, guard_bytes
from lowvram.offload import parse_device, parse_size
assert parse_size("8GiB") == 8 << 30 and format_size(1 << 30) == "1 GiB" and devices()
assert parse_device(default_device())[0] and Budget(4, 1, 1).usable == 2 and guard_bytes(1)
with Store.open(sys.argv[1]) as store:
    assert store.info("a").shape == (3,)
heavy = {"torch", "numpy", "safetensors", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", offload.__all__)
def test_the_door_opens_on_every_name(name: str) -> None:
    assert getattr(offload, name) is not None
    assert name in dir(offload)


def test_the_door_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match=r"'lowvram\.offload' has no attribute 'Arena'"):
        offload.Arena  # noqa: B018


def test_building_and_loading_a_part_imports_no_compiler(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 4)}, tmp_path / "model.safetensors")
    code = """
import sys
import torch
from lowvram.offload import Loader, Meter, Part, Store, open_device
device, part = open_device("cpu"), Part("table", "", lambda: torch.nn.Embedding(3, 4), torch.float)
meter = Meter(device)
with Store.open(sys.argv[1]) as store, meter.phase("prefill"):
    Loader(store, device, meter, [part]).load("table")(torch.zeros(1, dtype=torch.long))
heavy = {"sympy", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from lowvram.offload import Loader, Meter, Part, Store, open_device

def used():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) << 10

folder, spare, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
device = open_device("cpu")
part = Part("big", "", lambda: nn.Linear(4096, 4096, bias=False), dtype)
with Store.open(folder) as store:
    loader = Loader(store, device, Meter(device), [part])
    torch.ones(8).to(dtype).sum()
    size = loader.nbytes("big")
    resource.setrlimit(resource.RLIMIT_DATA, (used() + size + spare, resource.RLIM_INFINITY))
    for _ in range(2):
        with loader.use("big", keep=False) as module:
            assert float(module.weight[0, 0]) == 1 and float(module.weight[-1, -1]) == 2
    module = loader.load("big")
    try:
        second = torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        assert "allocate memory" in str(error), error
    else:
        raise SystemExit("the limit does not hold")
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_is_loaded_in_its_own_size_and_little_more(tmp_path: Path, dtype: str) -> None:
    """The system refuses the process more than the part and 12 MiB: no second copy, no mapping."""
    weight = torch.ones(4096, 4096)
    weight[-1, -1] = 2
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    done = run(LIMITED, str(tmp_path), str(12 * MIB), dtype)
    assert done.returncode == 0, done.stderr


GIVEN_BACK = """
import sys
from pathlib import Path
import torch
from torch import nn
from lowvram.offload import Loader, Meter, Part, Store, open_device

def used():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) << 10

device = open_device("cpu")
many = lambda: nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(64))
part = Part("many", "", many, torch.float32)
with Store.open(sys.argv[1]) as store:
    loader = Loader(store, device, Meter(device), [part])
    size = loader.nbytes("many")
    del_me = torch.ones(30 << 20, dtype=torch.uint8)
    del del_me  # from here on glibc would keep smaller blocks in its heap
    kept = []
    for _ in range(3):
        loader.load("many")
        kept.append(torch.ones(1000))  # on top of the heap
        full = used()
        loader.drop("many")
        assert full - used() > size - (4 << 20), (full, used(), size)
"""


def test_what_is_dropped_leaves_the_process(tmp_path: Path) -> None:
    save_file(
        {f"{i}.weight": torch.ones(512, 512) for i in range(64)}, tmp_path / "model.safetensors"
    )
    done = run(GIVEN_BACK, str(tmp_path))
    assert done.returncode == 0, done.stderr
