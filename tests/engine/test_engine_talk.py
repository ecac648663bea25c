"""The Talker's loop: what it waits for, what it allocates, where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import simdevice as sim
import torch
from simdevice import simulated
from torch import Tensor

from lowvram import LowVRAMOmni, Result
from lowvram.engine.inputs import Readback, Turns
from lowvram.engine.passes import DecoderPasses
from lowvram.engine.sampling import Sampler
from lowvram.engine.talk import TalkLoop
from lowvram.models.text import Decoder
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES, AcceleratorDevice
from lowvram.pocket import make_checkpoint, pocket_config

WORDS = [{"role": "user", "content": "Say something."}]
CODES = 20
END = 8294  # the pocket's, as published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "pocket", seed=5)


def reply(folder: Path, device: str, codes: int = CODES) -> Result:
    if device == "npu":
        sim.reset()
        sim.configure(limit=8 << 30, context=FALLBACK_CONTEXT_BYTES)
    with LowVRAMOmni.from_pretrained(folder, device=device, dtype="bfloat16") as omni:
        return omni.generate(WORDS, max_new_tokens=4, max_speech_seconds=codes / 50)


def spied(
    monkeypatch: pytest.MonkeyPatch, of: type, name: str, count: Callable[[], int]
) -> list[int]:
    """By how much every call of that method moves a counter."""
    original, seen = getattr(of, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        before = count()
        result = original(*args, **kwargs)
        seen.append(count() - before)
        return result

    monkeypatch.setattr(of, name, call)
    return seen


def test_a_step_waits_for_the_device_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @simulated
    def inside() -> None:
        # The meter waits at the end of a few steps, to look.
        monkeypatch.setattr(AcceleratorDevice, "synchronize", lambda device: None)
        waits = spied(monkeypatch, TalkLoop, "step", sim.waits)
        reply(folder, "npu")
        # Of the first code the host may have heard before.
        assert waits[0] <= 1 and waits[1:] == [1] * (CODES - 2)
        assert sim.races() == []

    inside()


def test_what_a_step_adds_to_its_pass_is_allocated_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @simulated
    def inside() -> None:
        own = [
            spied(monkeypatch, of, name, sim.allocations)
            for of, name in ((Sampler, "draw"), (TalkLoop, "_send"), (Readback, "send"))
        ]
        growth = spied(monkeypatch, TalkLoop, "step", sim.live_bytes)
        reserved = spied(monkeypatch, TalkLoop, "step", torch.npu.memory_reserved)
        reply(folder, "npu")
        draws, sends, reads = own
        draws = draws[-CODES:]  # before them the text was drawn
        assert draws[0] > 0
        assert not any(draws[1:] + sends + reads)
        assert len(growth) == CODES - 1 and not any(growth[1:])
        assert not any(reserved[1:])

    inside()


class Script:
    """Has these codes drawn, one after the other and over again; counts the Talker's steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, codes: Sequence[int]) -> None:
        self.drawn = self.steps = 0
        draw, step = Sampler.draw, DecoderPasses.step

        def told(sampler: Sampler, logits: Tensor, noise: Tensor | None) -> Tensor:
            token = draw(sampler, logits, noise)
            if logits.shape[-1] == pocket_config()["talker_config"]["vocab_size"]:
                token.fill_(codes[self.drawn % len(codes)])
                self.drawn += 1
            return token

        def counted(passes: DecoderPasses, x: Tensor, position: int) -> Tensor:
            self.steps += passes._part == "talker"
            return step(passes, x, position)

        monkeypatch.setattr(Sampler, "draw", told)
        monkeypatch.setattr(DecoderPasses, "step", counted)


@pytest.mark.parametrize(
    ("script", "codes", "passes"),
    [([5, 6, 7, END], 50, 3), ([END], 50, 0), ([5, 6], 5, 4), ([5], 1, 0)],
    ids=["ends", "ends at once", "is cut", "is one code"],
)
def test_codes_stop_where_the_reply_does(
    script: list[int], codes: int, passes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_the_end = script[: script.index(END)] if END in script else script * codes
    wanted = tuple(before_the_end[:codes])
    told = Script(monkeypatch, script)
    assert reply(folder, "cpu", codes).codes == wanted
    assert told.steps == passes
    told.drawn = told.steps = 0

    @simulated
    def inside() -> None:
        # Its host hears of a code while the next one is made, and may be one step too far.
        assert reply(folder, "npu", codes).codes == wanted
        assert told.steps - passes in ({0, 1} if END in script else {0})
        assert sim.races() == []

    inside()


def test_a_state_after_the_end_of_the_reply_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TalkLoop.step

    def twice(self: TalkLoop, reply: Tensor | None) -> Sequence[int]:
        codes = step(self, reply)
        if reply is None and not self.ended:
            with pytest.raises(ValueError, match="after the end of the reply"):
                step(self, torch.zeros(1, 8))
            refused.append(True)
        return codes

    refused: list[bool] = []
    monkeypatch.setattr(TalkLoop, "step", twice)
    reply(folder, "cpu")
    assert refused


def test_rotary_tables_come_in_order_over_the_edges_of_blocks() -> None:
    from lowvram.config import OmniConfig
    from lowvram.models import Talker

    config = OmniConfig.from_dict(pocket_config()).talker
    assert config is not None
    decoder: Decoder = Talker(config).model
    turns = Turns(decoder, torch.float32, 64)
    found = [turns.at(position) for position in range(11, 161)]
    places = torch.arange(11, 161).expand(3, 1, -1)
    for kind, table in enumerate(decoder.tables(places, torch.float32)):
        assert torch.equal(torch.cat([turn[kind] for turn in found], 1), table)
