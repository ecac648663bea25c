"""Layers that stream, a cache on the host, and memory that runs out: the reply stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram import DoesNotFitError, LowVRAMOmni, Result
from lowvram.engine.host_kv import HostKVCache
from lowvram.models.kv_cache import KVCache
from lowvram.models.text import DecoderLayer
from lowvram.offload import Loader, Placement, open_device
from lowvram.planner import Plan
from lowvram.pocket import make_checkpoint

# Longer than a chunk of 64 tokens, so that chunks have a past.
WORDS = [{"role": "user", "content": "Say something. " * 40}]
SHORT: dict[str, Any] = {"max_new_tokens": 6, "max_speech_seconds": 0.6}
CHUNKS = {"text": 64, "talker": 64}

Change = Callable[[Plan], Plan]


@pytest.fixture(scope="module", params=[False, True], ids=["16-bit", "awq"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pocket"
    make_checkpoint(path, seed=5, awq=request.param)
    return path


def opened(folder: Path, change: Change) -> LowVRAMOmni:
    """A model whose plans are changed before they run."""
    omni = LowVRAMOmni.from_pretrained(folder, device="cpu", kernel="reference")
    plan = omni._plan
    omni._plan = lambda *of: change(replace(plan(*of), chunks=CHUNKS))  # type: ignore[method-assign]
    return omni


@pytest.fixture(scope="module")
def plain(folder: Path) -> Result:
    with opened(folder, lambda plan: plan) as omni:
        return omni.generate(WORDS, **SHORT)


def check_same(one: Result, other: Result) -> None:
    assert one.tokens == other.tokens
    assert one.codes == other.codes
    assert one.audio is not None and np.array_equal(one.audio, other.audio)  # type: ignore[arg-type]


def on_host(plan: Plan) -> Plan:
    return replace(plan, kv={"thinker": "host", "talker": "host"})


def test_a_cache_on_the_host_changes_nothing(folder: Path, plain: Result) -> None:
    with opened(folder, on_host) as omni:
        check_same(omni.generate(WORDS, **SHORT), plain)
        check_same(omni.generate(WORDS, **SHORT), plain)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_cache_on_the_host_returns_what_one_on_the_device_does(layers: int) -> None:
    """A prompt layer by layer in two chunks, then steps through all layers."""
    shape: dict[str, Any] = {"layers": layers, "batch": 1, "kv_heads": 2, "max_tokens": 9}
    cpu = open_device("cpu")
    there = KVCache(**shape, head_dim=4, dtype=torch.float32, device="cpu")
    host = HostKVCache(cpu, **shape, head_dim=4, dtype=torch.float32)
    assert host.nbytes == there.nbytes // layers * 2

    def check(index: int, start: int, tokens: int) -> None:
        keys, values = torch.randn(2, 1, 2, tokens, 4)
        wanted = there.write(index, start, keys, values)
        for one, other in zip(host.write(index, start, keys, values), wanted, strict=True):
            assert torch.equal(one, other)

    for index in range(layers):
        with host.at(index, 0):
            check(index, 0, 4)
            check(index, 4, 2)
    for start in (6, 7, 8):
        for index in range(layers):
            with host.at(index, start):
                check(index, start, 1)
    with host.at(0, 9), pytest.raises(ValueError, match="10 tokens in a KV cache made for 9"):
        host.write(0, 9, *torch.randn(2, 1, 2, 1, 4))
    host.free()
    assert host.nbytes == 0


def failing(monkeypatch: pytest.MonkeyPatch, kind: str, *calls: int) -> None:
    """The n-th calls of a decoder layer, for a "prompt" or a "step", run out of memory."""
    forward, count = DecoderLayer.forward, 0

    def fail(self: DecoderLayer, x: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal count
        count += (x.shape[1] == 1) == (kind == "step")
        if count in calls and (x.shape[1] == 1) == (kind == "step"):
            raise torch.OutOfMemoryError("injected")
        return forward(self, x, *args)

    monkeypatch.setattr(DecoderLayer, "forward", fail)


def run_out(folder: Path, change: Change) -> tuple[Result, tuple[str, ...]]:
    with opened(folder, change) as omni:
        result = omni.generate(WORDS, **SHORT)
        assert omni.generate(WORDS, **SHORT).tokens == result.tokens
        return result, result.report.notes


@pytest.mark.parametrize("change", [lambda plan: plan, on_host], ids=["resident", "kv-host"])
def test_a_chunk_that_runs_out_of_memory_is_halved(
    change: Change, folder: Path, plain: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "prompt", 3, 5)
    result, notes = run_out(folder, change)
    assert result.tokens == plain.tokens and result.codes == plain.codes
    assert notes == ("text: chunks of 32 tokens", "text: chunks of 16 tokens")


def placed(folder: Path, part: str, streamed: Sequence[int], slabs: int = 2) -> Placement:
    """Those units of a part from the file, through slabs of the size they need."""
    with LowVRAMOmni.from_pretrained(folder, device="meta") as omni:
        sizes = omni._loader.unit_bytes(part)
    largest = max(sizes[i] for i in streamed)
    return Placement(streamed=tuple(streamed), slabs=slabs, slab_bytes=largest)


def units(folder: Path, part: str) -> int:
    with LowVRAMOmni.from_pretrained(folder, device="meta") as omni:
        return len(omni._loader.unit_bytes(part))


@pytest.mark.parametrize("keep", ["none", "every other", "all but one"])
@pytest.mark.parametrize("slabs", [2, 3])
def test_streamed_units_change_nothing(folder: Path, plain: Result, keep: str, slabs: int) -> None:
    def stream(plan: Plan) -> Plan:
        placements = {}
        for part in ("text", "talker"):
            count = units(folder, part)
            streamed = {"none": range(count), "every other": range(0, count, 2)}.get(keep, [1])
            placements[part] = placed(folder, part, streamed, slabs)
        return replace(plan, placements=placements)

    with opened(folder, stream) as omni:
        check_same(omni.generate(WORDS, **SHORT), plain)
        assert not {"text", "talker"} & set(omni.resident)
        check_same(omni.generate(WORDS, **SHORT), plain)


def test_a_step_that_runs_out_of_memory_has_units_streamed(
    folder: Path, plain: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as free the bytes of one: two slabs for three units, then a unit at a time."""
    failing(monkeypatch, "step", 6, 14)
    result, notes = run_out(folder, lambda plan: plan)
    check_same(result, plain)
    assert [note.partition(" streamed")[0] for note in notes] == [
        "text: 3 units",
        "text: 4 units",
    ]


def test_without_any_room_the_error_is_clear_and_nothing_stays(
    folder: Path, plain: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(folder, lambda plan: plan) as omni:
        with monkeypatch.context() as patch:
            failing(patch, "step", *range(1, 1000))
            with pytest.raises(DoesNotFitError, match="ran out of memory within a plan of"):
                omni.generate(WORDS, **SHORT)
            assert omni.resident == () and omni._meter.held() == {}
        check_same(omni.generate(WORDS, **SHORT), plain)


@pytest.mark.parametrize("part", ["text", "talker", "token2wav"])
def test_parts_that_wait_are_dropped_for_one_that_does_not_load(
    part: str, folder: Path, plain: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(folder, lambda plan: plan) as omni:
        omni.generate(WORDS, **SHORT)
        waiting = set(omni.resident) - {part}
        omni._loader.drop(part)
        load, calls = Loader.load, 0

        def fail(self: Loader, name: str, *of: Any) -> Any:
            nonlocal calls
            calls += name == part
            if name == part and calls == 1:
                raise torch.OutOfMemoryError("injected")
            return load(self, name, *of)

        monkeypatch.setattr(Loader, "load", fail)
        result = omni.generate(WORDS, **SHORT)
        check_same(result, plain)
        (note,) = result.report.notes
        dropped = set(note.partition(":")[0].split(", "))
        assert dropped and dropped <= waiting and note.endswith(f"to make room for {part}")
