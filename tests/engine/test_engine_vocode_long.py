"""Long speech: work, memory and what is kept do not grow with it, and nobody hears where pieces
meet."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_speech import speech_config, tiny_codes, tiny_token2wav, tiny_voice
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowvram.config import BigVGANConfig, DiTConfig, OmniConfig
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.vocode import NoiseSource, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.models.token2wav import Token2Wav
from lowvram.offload import Meter, open_device

MODES = {"default": VocodeSettings(), "exact": VocodeSettings(exact=True)}
modes = pytest.mark.parametrize("settings", MODES.values(), ids=MODES)


@pytest.fixture(scope="module")
def published() -> Token2Wav:
    """The published shapes, on meta; its vocoder does nothing, at no cost."""
    with torch.device("meta"):
        model = Token2Wav(OmniConfig(dit=DiTConfig(), bigvgan=BigVGANConfig()))
    model.wave = lambda mel: mel.new_empty(240 * len(mel))  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(("mode", "least", "most"), [("default", 1.05, 1.25), ("exact", 1, 1.01)])
def test_operations_over_twenty_seconds(
    mode: str, least: float, most: float, published: Token2Wav
) -> None:
    """Of the DiT, against those of the whole utterance; one evaluation, of which all are like."""
    settings = replace(MODES[mode], time_points=2)
    voice = Voice("Any", 0, torch.zeros(1, 192), torch.zeros(1, 400, 80))
    stream = SpeechStream(published, voice, NoiseSource(0), settings)
    stream.prepare()
    with FlopCounterMode(display=False) as streamed:
        assert sum(len(p.samples) for p in (*stream.push([0] * 1000), *stream.finish())) == 480_000
    utterance = published.prepare(voice, "euler", 2)
    with FlopCounterMode(display=False) as whole:
        published.mel(utterance, [0] * 1000, torch.zeros(2000, 80))
    ratio = streamed.get_total_flops() / whole.get_total_flops()
    assert least < ratio <= most


@modes
def test_later_seconds_peak_as_the_first(settings: VocodeSettings) -> None:
    """On meta, by the meter; two evaluations, of which all others are like."""
    with torch.device("meta"):
        model = Token2Wav(OmniConfig.from_dict(speech_config()))
    fewer = replace(settings, time_points=3)
    stream = SpeechStream(model, tiny_voice(), NoiseSource(0), fewer)
    meter, peaks = Meter(open_device("meta")), []
    for seconds in (7, 8):
        meter.restart()
        with meter.phase("work"), torch.inference_mode():
            for piece in stream.push([0] * (50 * seconds)):
                assert len(piece.samples)
        peaks.append(meter.phases[0].peak_bytes)
    assert peaks[1] <= 1.01 * peaks[0]


class Recorder:
    """In the place of a Token2Wav: no arithmetic, remembers the longest tensor it was given."""

    repeats, samples_per_code = 2, 480

    def __init__(self) -> None:
        self.code2wav_dit_model = self
        self.config = DiTConfig()
        self.longest = 0
        self.late = torch.empty(0, 80)

    def check_codes(self, codes: list[int]) -> None:
        pass

    def prepare(self, *_: Any) -> object:
        return self

    def past(self, _: object) -> object:
        return self

    def wavefront(self, _: object) -> Recorder:
        return self

    def mel(self, _: Any, codes: list[int], noise: Tensor, __: Any, final: int | None) -> Tensor:
        self.longest = max(self.longest, noise.untyped_storage().nbytes() // 320)
        assert len(noise) == 2 * len(codes)
        return noise if final is None else noise[: 2 * final]

    def advance(self, codes: list[int], noise: Tensor, blocks: int) -> Tensor:
        """Nine blocks late, as the exact solver."""
        assert len(noise) == 2 * len(codes) <= 24 * blocks
        self.late = torch.cat((self.late, noise))
        kept = 9 * 24 if len(noise) == 24 * blocks else max(0, len(self.late) - 24 * blocks)
        ready = max(0, len(self.late) - kept)
        done, self.late = self.late[:ready], self.late[ready:].clone()
        return done

    def wave(self, mel: Tensor) -> Tensor:
        self.longest = max(self.longest, mel.untyped_storage().nbytes() // 320)
        return torch.zeros(len(mel) * 240)


@modes
def test_nothing_is_kept_of_an_hour(settings: VocodeSettings) -> None:
    """Twelve times the 30,000 frames at which the official mode runs out of noise."""
    model: Any = Recorder()
    stream = SpeechStream(model, tiny_voice(), NoiseSource(7), settings)
    samples, objects = 0, []
    for minute in range(60):
        samples += sum(len(piece.samples) for piece in stream.push([1000] * 3000))
        if minute in (2, 59):
            objects.append(len(gc.get_objects()))
    samples += sum(len(piece.samples) for piece in stream.finish())
    assert samples == 480 * 180_000
    # A window of the vocoder, and what the last pass of the DiT appends to it.
    assert model.longest <= 40 + 2 * 216
    assert objects[1] <= objects[0] + 50
    assert len(stream._codes) < 300 and len(stream._noise._drawn) < 300


@pytest.mark.parametrize("exact", [False, True])
def test_where_pieces_meet_there_is_no_step(exact: bool) -> None:
    """Between the last sample of a piece and the first of the next, as between any others."""
    settings = VocodeSettings(blocks=(1, 2, 3), time_points=5, exact=exact)
    draw = random.Random(f"seams {exact}")
    for count in (draw.randint(60, 110), 97):
        model, codes = tiny_token2wav(draw.randrange(100), std=0.08), tiny_codes(count, seed=count)
        stream = SpeechStream(model, tiny_voice(), NoiseSource(7), settings)
        pieces = [piece.samples for piece in (*stream.push(codes), *stream.finish())]
        assert len(pieces) > 2
        steps = np.abs(np.diff(np.concatenate(pieces)))
        seams = np.cumsum([len(piece) for piece in pieces])[:-1] - 1
        inside = np.delete(steps, seams)
        assert steps[seams].max() <= inside.max()
