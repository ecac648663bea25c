"""The laws against the meter: the engine's own modules on `meta`, at true and at small shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowvram.config import DecoderConfig, OmniConfig
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.vocode import NoiseSource, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.models import (
    AudioTower,
    KVCache,
    Talker,
    ThinkerText,
    Token2Wav,
    VisionTower,
    dense,
)
from lowvram.models.head import PiecewiseHead
from lowvram.offload import Meter, open_device
from lowvram.planner import laws
from lowvram.planner.kernels import kernels_of
from lowvram.planner.sound import vocode_bytes
from lowvram.pocket import pocket_config
from lowvram.specs import SPECS

CONFIGS = {
    "7B": SPECS["Qwen2.5-Omni-7B"].config,
    "3B": SPECS["Qwen2.5-Omni-3B"].config,
    "pocket": OmniConfig.from_dict(pocket_config()),
}
DTYPES = (torch.bfloat16, torch.float32)
LOOSEST = {"7B": 1.1, "3B": 1.1, "pocket": 1.4}
"""How far above the meter a law may lie: at true shapes it decides what fits. In the smallest
model what laws do not count, and tables that only some moments need, are a good part."""

META = kernels_of("meta")

both = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
models = pytest.mark.parametrize("name", CONFIGS)


def build(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return make().to(dtype).requires_grad_(False)


def measured(work: Callable[[], object]) -> int:
    """Bytes that the work makes for itself, at its peak."""
    meter = Meter(open_device("meta"))
    with meter.phase("work"), torch.inference_mode():
        work()
    return meter.phases[0].peak_bytes


def check(name: str, work: Callable[[], object], law: int) -> None:
    seen = measured(work)
    assert seen <= law <= LOOSEST[name] * seen + laws.SMALL


def shallow(config: Any, **fields: Any) -> Any:
    """Two layers: peaks do not depend on depth."""
    return dataclasses.replace(config, **fields)


@both
@models
@pytest.mark.parametrize("grid", [(4, 6), (26, 38), (54, 54)])
def test_vision(name: str, dtype: torch.dtype, grid: tuple[int, int]) -> None:
    config = shallow(CONFIGS[name].thinker.vision, depth=2, fullatt_block_indexes=(1,))
    tower = build(lambda: VisionTower(config), dtype)
    height, width = grid
    patches = torch.empty(height * width, config.patch_values)
    law = laws.vision_bytes(config, height * width, dtype.itemsize, META)
    check(name, lambda: tower(patches.to("meta", dtype), height, width), law)


@both
@models
def test_audio(name: str, dtype: torch.dtype) -> None:
    config = shallow(CONFIGS[name].thinker.audio, encoder_layers=2)
    tower = build(lambda: AudioTower(config), dtype)
    frames = 2 * config.n_window
    mel = torch.empty(config.num_mel_bins, frames)
    law = laws.audio_bytes(config, frames, dtype.itemsize, META)
    check(name, lambda: tower(mel.to("meta", dtype)), law)


def decoding(
    model: Any, decoder: DecoderConfig, width: int, tokens: int, dtype: torch.dtype
) -> Callable[[], object]:
    """`tokens` tokens of `width` after a hundred others, to the logits of the last."""
    past = 100
    shape = (2, 1, decoder.num_key_value_heads, past + tokens, decoder.head_dim)
    cache = KVCache(*shape, dtype, "meta")

    def feed() -> torch.Tensor:
        x = torch.empty(1, tokens, width).to("meta", dtype)
        return x if isinstance(model, ThinkerText) else model.project(x)

    def through() -> torch.Tensor:
        x = feed()
        rope = model.model.rope(torch.zeros(3, 1, tokens, dtype=torch.long), dtype)
        return model.model(x, rope, cache, past)[:, -1]

    def work() -> None:
        model.logits(through())

    return work


@both
@models
@pytest.mark.parametrize("tokens", [1, 40, 512])
def test_thinker(name: str, dtype: torch.dtype, tokens: int) -> None:
    thinker = CONFIGS[name].thinker
    text = shallow(thinker.text, num_hidden_layers=2)

    def linear(part: str, inputs: int, outputs: int, bias: bool) -> torch.nn.Module:
        if part == "thinker.lm_head":
            return PiecewiseHead(inputs, outputs, dtype.itemsize, "lm_head.weight")
        return dense(part, inputs, outputs, bias)

    model = build(lambda: ThinkerText(shallow(thinker, text=text), linear), dtype)
    work = decoding(model, text, text.hidden_size, tokens, dtype)
    if tokens == 1:
        check(name, work, laws.decode_bytes(text, 101, dtype.itemsize, META))
    else:
        check(name, work, laws.prefill_bytes(text, tokens, dtype.itemsize, 512, META))


@both
@models
def test_talker(name: str, dtype: torch.dtype) -> None:
    talker = CONFIGS[name].talker
    assert talker is not None
    decoder = shallow(talker.decoder, num_hidden_layers=2)
    model = build(lambda: Talker(shallow(talker, decoder=decoder)), dtype)
    law = laws.talk_bytes(shallow(talker, decoder=decoder), 512, dtype.itemsize, 512, META)
    check(name, decoding(model, decoder, talker.embedding_size, 512, dtype), law)


@functools.cache
def vocoder(name: str) -> Any:
    return build(lambda: Token2Wav(CONFIGS[name]), torch.float32)


# The 3B's vocoder is the 7B's.
@pytest.mark.parametrize("name", ["7B", "pocket"])
@pytest.mark.parametrize(
    ("solver", "codes", "exact"),
    [
        ("euler", 1, False),
        ("euler", 70, False),
        ("euler", 130, False),
        ("euler", 300, False),
        ("rk4", 70, False),
        ("euler", 30, True),
        ("euler", 130, True),
        ("rk4", 70, True),
    ],
)
def test_vocoder(name: str, solver: Any, codes: int, exact: bool) -> None:
    config = CONFIGS[name]
    assert config.dit is not None and config.bigvgan is not None
    model = vocoder(name)
    voice = Voice("any", 0, torch.zeros(1, config.dit.enc_emb_dim), torch.zeros(1, 400, 80))
    settings = VocodeSettings(solver=solver, exact=exact)

    def work() -> None:
        stream = SpeechStream(model, voice, NoiseSource(0), settings)
        for piece in (*stream.push([0] * codes), *stream.finish()):
            assert len(piece.samples)

    check(name, work, vocode_bytes(config.dit, config.bigvgan, settings, codes, 400, META))
