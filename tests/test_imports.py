"""What is imported when: nothing heavy before it is needed, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lowvram

HEAVY = ("torch", "transformers", "torchvision", "accelerate")


def heavy_after(code: str) -> list[str]:
    """The heavy modules that a fresh interpreter has imported when it has run `code`."""
    tail = f"\nimport sys; print(*[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].split()


def test_the_package_is_light() -> None:
    assert heavy_after("import lowvram") == []


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["plan"], 0),
        (["plan", "--max-memory", "1MiB"], 3),
        (["doctor"], 0),
        (["--nonsense"], 2),
        (["--speaker", "Nobody"], 2),
        (["--allow", "nothing"], 2),
        (["--device", "abacus"], 2),
        (["-m", "no/such/folder", "-p", "hi", "--offline"], 1),
        (["-o", "no/such/folder/out.wav"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_needs_no_weights_imports_no_torch(argv: list[str], code: int) -> None:
    run = f"from lowvram.cli.main import main\nassert main({argv}) == {code}"
    assert heavy_after(run) == []


def test_the_check_itself_sees_torch() -> None:
    assert heavy_after("import torch") == ["torch"]


@pytest.mark.parametrize("name", lowvram.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(lowvram, name) is not None
    assert name in dir(lowvram)


def test_unknown_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'lowvram' has no attribute 'LowVram'"):
        _ = lowvram.LowVram  # type: ignore[attr-defined]
