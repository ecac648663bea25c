"""Weights on the host are asked for in huge pages, and in no byte more than they have."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lowvram.quant import huge_pages
from lowvram.quant.huge_pages import HUGE, in_huge_pages, inside
from lowvram.quant.kernels import native
from lowvram.quant.side_by_side import side_by_side


@pytest.mark.parametrize(
    ("start", "nbytes", "first", "pages"),
    [
        (0, HUGE, 0, 1),
        (0, HUGE - 1, 0, 0),
        (64, HUGE, HUGE, 0),
        (64, 2 * HUGE - 64, HUGE, 1),
        (3 * HUGE - 1, 5 * HUGE, 3 * HUGE, 4),
    ],
)
def test_only_whole_ones_inside(start: int, nbytes: int, first: int, pages: int) -> None:
    assert inside(start, nbytes) == (first, pages * HUGE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []
    libc = SimpleNamespace(madvise=lambda *given: calls.append(given))
    monkeypatch.setattr(huge_pages, "_libc", lambda: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    return calls


def test_they_are_asked_for_on_the_host_alone(asked: list[tuple[int, int, int]]) -> None:
    large = torch.empty(3 * HUGE, dtype=torch.uint8)
    assert in_huge_pages(large) is large
    ((start, length, advice),) = asked
    assert large.data_ptr() <= start and start + length <= large.data_ptr() + large.nbytes
    assert start % HUGE == 0 and length in (2 * HUGE, 3 * HUGE) and advice == 14
    in_huge_pages(torch.empty(HUGE - 1, dtype=torch.uint8))
    in_huge_pages(torch.empty(3 * HUGE, dtype=torch.uint8, device="meta"))
    assert len(asked) == 1


def test_what_the_compiled_kernels_read_is_in_them(asked: list[tuple[int, int, int]]) -> None:
    packed, _ = native.empty(4096, 4096, 128, torch.float16, torch.device("cpu"))
    assert [length for _, length, _ in asked] == [inside(packed.data_ptr(), packed.nbytes)[1]]


def test_joined_weights_are_in_them(asked: list[tuple[int, int, int]]) -> None:
    parts = [torch.full((rows, HUGE), rows, dtype=torch.uint8) for rows in (1, 3)]
    (joined,) = side_by_side([parts], [0])
    assert torch.equal(joined, torch.cat(parts))
    ((start, length, _),) = asked
    assert (start, length) == inside(joined.data_ptr(), joined.nbytes)


def test_the_system_takes_it() -> None:
    large = in_huge_pages(torch.empty(64 * HUGE, dtype=torch.uint8))
    assert large.fill_(7).amin() == large.amax() == 7
