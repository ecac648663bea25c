"""Ctrl-C inside a layer, at each phase: nothing stays, and the next request is as if alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from replies import held, open_model, same_reply

from lowvram import LowVRAMOmni, Result
from lowvram.models.audio import AudioLayer
from lowvram.models.bigvgan import ResidualBlock
from lowvram.models.dit import Block
from lowvram.models.text import DecoderLayer
from lowvram.models.vision import VisionBlock
from lowvram.offload import Store
from lowvram.pocket import make_checkpoint

ASKED: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": np.full((56, 56, 3), 90, np.uint8)},
            {"type": "audio", "audio": np.sin(np.arange(4000) / 9).astype(np.float32)},
            {"type": "text", "text": "Well?"},
        ],
    }
]
SHORT: dict[str, Any] = {"max_new_tokens": 3, "max_speech_seconds": 0.1}

PLACES: dict[str, tuple[type, str, int]] = {
    "loading": (Store, "read_run", 5),
    "vision": (VisionBlock, "forward", 2),
    "audio": (AudioLayer, "forward", 1),
    "prefill": (DecoderLayer, "forward", 2),
    "decode": (DecoderLayer, "forward", 6),
    "talk": (DecoderLayer, "forward", 14),
    "mel": (Block, "forward", 9),
    "wave": (ResidualBlock, "forward", 2),
}
"""Where it comes: a class, its method, and which call of it."""


@pytest.fixture(scope="module", params=["resident", "streamed"])
def omni(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LowVRAMOmni]:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "pocket", seed=5)
    with open_model(folder, ASKED, SHORT, tight=request.param == "streamed") as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(omni: LowVRAMOmni) -> Result:
    return omni.generate(ASKED, **SHORT)


@pytest.mark.parametrize("place", PLACES)
def test_an_interruption_leaves_nothing(
    place: str, omni: LowVRAMOmni, wanted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    omni._loader.close()
    kind, method, last = PLACES[place]
    original, calls = getattr(kind, method), []

    def interrupted(*of: Any) -> Any:
        calls.append(None)
        if len(calls) == last:
            raise KeyboardInterrupt
        return original(*of)

    with monkeypatch.context() as patched:
        patched.setattr(kind, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            omni.generate(ASKED, **SHORT)
    assert omni.resident == () and held(omni) == {}
    assert same_reply(omni.generate(ASKED, **SHORT), wanted)
