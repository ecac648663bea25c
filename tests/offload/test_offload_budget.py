"""Sizes in and out, and what a budget leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import UsageError
from lowvram.offload import Budget, format_size, guard_bytes, parse_size

GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("8G", 8 * GIB),
        ("8GB", 8_000_000_000),
        ("7.2 GB", 7_200_000_000),
        (" 512MiB ", 512 * MIB),
        ("1.5m", 3 * MIB // 2),
        (".5KiB", 512),
        ("2T", 2 << 40),
        ("1048576", MIB),
        ("9007199254740993 bytes", 9007199254740993),  # more digits than a float has
        (8 * GIB, 8 * GIB),
        (7.5e9, 7_500_000_000),
        (np.int64(GIB), GIB),
        (np.float32(1024), 1024),
    ],
)
def test_a_size_is_read(value: str | int | float, nbytes: int) -> None:
    assert parse_size(value) == nbytes


@pytest.mark.parametrize(
    "value",
    [
        *["", " ", "lots", "8 potatoes", "-1", "-8GiB", "8 Gibi", "GiB", "1e9", "8,5GB", "0x10"],
        *["8 8GiB", "8GiBs", "٨GiB", "1" * 70, "0", "0GiB", "0.5", "9" * 30, "9999999999TiB"],
        *[0, -1, 0.0, 0.5, float("nan"), float("inf"), -float("inf"), 1 << 63, 10**400, True],
    ],
)
def test_what_is_no_size_is_refused_with_the_accepted_forms(value: str | int | float) -> None:
    with pytest.raises(UsageError, match=r"8GiB.*8GB.*512MiB") as caught:
        parse_size(value)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250


def test_other_types_are_refused() -> None:
    with pytest.raises(UsageError, match="None is not a size"):
        parse_size(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (512 * MIB, "512 MiB"),
        (8 * GIB, "8 GiB"),
        (int(7.254 * GIB), "7.25 GiB"),
        (int(123.44 * MIB), "123.4 MiB"),
        (100 * MIB, "100 MiB"),
        (-3 * MIB, "-3 MiB"),
        (5 << 40, "5 TiB"),
    ],
)
def test_a_size_is_shown(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(min_value=1, max_value=1 << 60))
def test_a_size_shown_rounded_up_is_enough_when_typed_back(nbytes: int) -> None:
    back = parse_size(format_size(nbytes, round_up=True))
    assert nbytes <= back <= nbytes * 1.011 + 1
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= nbytes * 0.006 + 1


def test_the_guard_is_64_mib_or_two_percent() -> None:
    assert guard_bytes(GIB) == 64 * MIB
    assert guard_bytes(100 * GIB) == 2 * GIB


def test_usable_is_what_context_and_guard_leave() -> None:
    assert Budget(8 * GIB, GIB // 2, GIB // 4).usable == 7 * GIB + GIB // 4
    assert Budget(GIB // 2, GIB // 2, 64 * MIB).usable == 0
