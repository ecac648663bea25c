"""Speech in pieces: which passes run, that they cover everything once, and what they sound like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_speech import tiny_codes, tiny_token2wav, tiny_voice, token2wav_pair
from torch import Tensor

from lowvram.config import BigVGANConfig, DiTConfig, OmniConfig
from lowvram.engine.pieces import Pass, Schedule, VocodeSettings, passes
from lowvram.engine.vocode import NoiseSource, SpeechPiece, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.errors import CheckpointError, UsageError
from lowvram.models.token2wav import Token2Wav


def drain(schedule: Schedule) -> Iterator[Pass]:
    while step := schedule.next():
        schedule.done(step)
        yield step


FAST = VocodeSettings(time_points=2)


def speak(
    model: Token2Wav, codes: list[int], settings: VocodeSettings, groups: Iterable[int] = ()
) -> list[SpeechPiece]:
    """All pieces of `codes`, handed over in groups of these sizes and the rest at once."""
    stream = SpeechStream(model, tiny_voice(), NoiseSource(7), settings)
    pieces: list[SpeechPiece] = []
    rest = list(codes)
    for size in groups:
        pieces += stream.push(rest[:size])
        rest = rest[size:]
    return [*pieces, *stream.push(rest), *stream.finish()]


def waveform(pieces: list[SpeechPiece]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(piece.samples for piece in pieces)])


def test_passes_of_the_official_mode() -> None:
    """48 codes after 24 and before 12, frames with 20 on both sides; the rest when it ends."""
    assert list(passes(VocodeSettings(), 130)) == [
        Pass("mel", 0, 60, 0, 48),
        Pass("wave", 0, 96, 0, 76),
        Pass("mel", 24, 108, 48, 96),
        Pass("wave", 56, 192, 76, 172),
        Pass("mel", 72, 130, 96, 130),
        Pass("wave", 152, 260, 172, 260),
    ]
    assert list(passes(VocodeSettings(whole=True), 130)) == [
        Pass("mel", 0, 130, 0, 130),
        Pass("wave", 0, 260, 0, 260),
    ]


settings_strategy = st.builds(
    VocodeSettings,
    chunk_codes=st.sampled_from([12, 24, 48]),
    left_codes=st.sampled_from([0, 12, 24, 36]),
    right_codes=st.integers(0, 25),
    vocoder_left_frames=st.integers(0, 40),
    vocoder_right_frames=st.integers(0, 40),
    whole=st.booleans(),
)


@settings(deadline=None)
@given(settings_strategy, st.integers(0, 400))
def test_passes_cover_everything_once_with_their_context(s: VocodeSettings, codes: int) -> None:
    done = {"mel": 0, "wave": 0}
    contexts = {
        "mel": (s.left_codes, s.right_codes, s.chunk_codes),
        "wave": (s.vocoder_left_frames, s.vocoder_right_frames, 2 * s.chunk_codes),
    }
    for step in passes(s, codes):
        left, right, chunk = contexts[step.stage]
        end = codes if step.stage == "mel" else 2 * codes
        assert step.keep_from == done[step.stage] < step.keep_to
        done[step.stage] = step.keep_to
        if s.whole:
            assert (step.start, step.stop) == (0, end)
            continue
        assert step.start == max(0, step.keep_from - left)
        assert step.stop == min(end, step.keep_to + right) or step.stop == end
        assert step.length <= left + chunk + right
        frames = step.length * (2 if step.stage == "mel" else 1)
        assert frames <= s.largest_pass(codes)[step.stage == "wave"]
        assert step.stage == "wave" or step.start % 12 == 0
        assert step.stage == "mel" or step.stop <= 2 * done["mel"]
    assert done == {"mel": codes, "wave": 2 * codes}


def test_the_largest_pass_is_reached() -> None:
    """84 codes and 136 frames with the official constants, from 108 codes on."""
    assert VocodeSettings().largest_pass(4096) == (168, 136)
    for codes in (5, 59, 108, 4096):
        lengths = [(step.stage, step.length) for step in passes(VocodeSettings(), codes)]
        assert VocodeSettings().largest_pass(codes)[0] == 2 * max(
            n for s, n in lengths if s == "mel"
        )
    assert max(n for s, n in lengths if s == "wave") == 136
    assert VocodeSettings(whole=True).largest_pass(300) == (600, 600)


@settings(deadline=None)
@given(settings_strategy, st.lists(st.integers(0, 90), max_size=8))
@example(VocodeSettings(right_codes=0), [48])
def test_passes_do_not_depend_on_how_codes_arrive(s: VocodeSettings, groups: list[int]) -> None:
    schedule = Schedule(s)
    seen: list[Pass] = []
    for size in groups:
        schedule.add(size)
        seen += drain(schedule)
    schedule.finish()
    seen += drain(schedule)
    assert seen == list(passes(s, sum(groups)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_codes": 0},
        {"left_codes": -1},
        {"vocoder_right_frames": -1},
        {"time_points": 1},
        {"solver": "heun"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="wanted"):
        VocodeSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"chunk_codes": 50}, {"left_codes": 20}])
def test_passes_begin_where_blocks_do(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="multiples of 12"):
        SpeechStream(tiny_token2wav(1), tiny_voice(), NoiseSource(0), VocodeSettings(**wrong))


def test_planning_imports_no_torch() -> None:
    check = "import sys, lowvram.engine.pieces; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_noise_is_one_long_draw_whatever_the_windows(steps: list[int]) -> None:
    start = sum(steps)
    long = torch.randn(2 * start + 4, 80, generator=torch.Generator().manual_seed(3))
    source, at = NoiseSource(3), 0
    for step in steps:
        assert torch.equal(source.window(at, at + 2 * step), long[at : at + 2 * step])
        at += step
    jumping = NoiseSource(3)
    assert torch.equal(jumping.window(start, start + 3), long[start : start + 3])


def test_noise_of_the_past_is_not_kept() -> None:
    source = NoiseSource(3)
    source.window(40, 50)
    with pytest.raises(ValueError, match="no longer kept"):
        source.window(38, 50)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 59, 60, 61, 130])
def test_480_samples_a_code_and_every_code_once(count: int, whole: bool) -> None:
    codes = tiny_codes(count)
    pieces = speak(tiny_token2wav(1), codes, VocodeSettings(time_points=2, whole=whole))
    samples = 0
    for i, piece in enumerate(pieces):
        samples += len(piece.samples)
        ended = sum((p.codes for p in pieces[: i + 1]), ())
        assert ended == tuple(codes[: samples // 480])
        assert piece.samples.dtype == np.float32 and len(piece.samples)
    assert samples == 480 * count


@pytest.mark.parametrize("settings", [FAST, VocodeSettings(time_points=2, whole=True)])
@pytest.mark.parametrize("groups", [[1] * 115, [60, 0, 55], [59, 1, 48]])
def test_pieces_do_not_depend_on_how_codes_arrive(
    settings: VocodeSettings, groups: list[int]
) -> None:
    model, codes = tiny_token2wav(1), tiny_codes(115)
    wanted = speak(model, codes, settings)
    for piece, same in zip(speak(model, codes, settings, groups), wanted, strict=True):
        assert np.array_equal(piece.samples, same.samples) and piece.codes == same.codes


def test_pieces_wait_for_the_reader() -> None:
    """What an iterator that is closed early has not made, the next one makes."""
    model, codes = tiny_token2wav(1), tiny_codes(120)
    stream = SpeechStream(model, tiny_voice(), NoiseSource(7), FAST)
    pieces = [next(stream.push(codes))]
    pieces += stream.finish()
    assert np.array_equal(waveform(pieces), waveform(speak(model, codes, FAST)))


def test_one_evaluation_in_pieces_is_the_whole_to_rounding() -> None:
    """Two blocks of left and one of right context are all that one evaluation sees."""
    model, codes = tiny_token2wav(1), tiny_codes(250)
    exact = VocodeSettings(time_points=2, vocoder_left_frames=34, vocoder_right_frames=34)
    whole = waveform(speak(model, codes, VocodeSettings(time_points=2, whole=True)))
    assert whole.std() > 0.1
    assert np.abs(waveform(speak(model, codes, exact)) - whole).max() < 5e-5
    for short in (replace(exact, left_codes=12), replace(exact, right_codes=0)):
        assert np.abs(waveform(speak(model, codes, short)) - whole).max() > 1e-3


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_official_context_is_close_to_the_whole(solver: Any) -> None:
    model, codes = tiny_token2wav(1, std=0.08), tiny_codes(150)
    whole = waveform(speak(model, codes, VocodeSettings(solver=solver, whole=True)))
    pieces = waveform(speak(model, codes, VocodeSettings(solver=solver)))
    assert 0 < np.sqrt(np.mean((pieces - whole) ** 2)) < 1e-3 * whole.std()


@pytest.mark.oracle
def test_pieces_are_those_of_the_official_loop(tmp_path: Path) -> None:
    """The official constants written out by hand for 110 codes, on the transformers modules."""
    theirs, ours = token2wav_pair(tmp_path, seed=4)
    codes, voice = tiny_codes(110), tiny_voice()
    noise = torch.randn(1, 220, 80, generator=torch.Generator().manual_seed(7))
    times = torch.linspace(0, 1, 10)
    times = times - (torch.cos(torch.pi / 2 * times) - 1 + times)

    def mel(start: int, stop: int) -> Tensor:
        state = noise[:, 2 * start : 2 * stop]
        for begin, end in pairwise(times):
            conditioned, plain = theirs.code2wav_dit_model(
                hidden_states=state,
                condition_vector=voice.ref_mel,
                speaker_embedding=voice.cond[:, None].expand(-1, state.shape[1], -1),
                quantized_code=torch.tensor([codes[start:stop]]),
                time_step=begin,
            )
            state = state + (end - begin) * (conditioned + (conditioned - plain) * 0.5)
        return state[0].T

    frames = torch.cat([mel(0, 60)[:, :96], mel(24, 108)[:, 48:144], mel(72, 110)[:, 48:]], dim=1)
    assert frames.shape == (80, 220)

    def wave(start: int, stop: int, keep_from: int, keep_to: int) -> Tensor:
        samples = theirs.code2wav_bigvgan_model(frames[None, :, start:stop])
        return samples[(keep_from - start) * 240 : (keep_to - start) * 240]

    wanted = torch.cat(
        [wave(0, 96, 0, 76), wave(56, 192, 76, 172), wave(152, 220, 172, 220)]
    ).numpy()
    got = waveform(speak(ours, codes, VocodeSettings()))
    assert wanted.std() > 1e-2
    assert np.abs(got - wanted).max() < 3e-5


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 9), ("rk4", 36)])
def test_what_is_constant_is_computed_once(solver: Any, evaluations: int) -> None:
    model, calls = tiny_token2wav(1), {"dit": 0, "speaker": 0, "time": 0, "modulation": 0}
    dit = model.code2wav_dit_model
    for name, module in {
        "dit": dit,
        "speaker": dit.input_embed.spk_encoder,
        "time": dit.time_embed,
        "modulation": dit.transformer_blocks[1].get_submodule("attn_norm.linear"),
    }.items():

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        module.register_forward_hook(count)
    settings = VocodeSettings(solver=solver)
    speak(model, tiny_codes(130), settings)
    assert settings.evaluations == evaluations
    assert calls == {"dit": 3 * evaluations, "speaker": 1, "time": 1, "modulation": 1}


class Recorder:
    """In the place of a Token2Wav: no arithmetic, remembers the lengths it was asked for."""

    repeats, samples_per_code = 2, 480

    def __init__(self) -> None:
        self.code2wav_dit_model = self
        self.config = DiTConfig()
        self.longest = 0

    def check_codes(self, codes: list[int]) -> None:
        pass

    def prepare(self, *_: Any) -> None:
        pass

    def mel(self, _: None, codes: list[int], noise: Tensor) -> Tensor:
        self.longest = max(self.longest, len(codes) * 2, noise.untyped_storage().nbytes() // 320)
        assert len(noise) == 2 * len(codes)
        return noise

    def wave(self, mel: Tensor) -> Tensor:
        assert len(mel) <= 136
        self.longest = max(self.longest, mel.untyped_storage().nbytes() // 320)
        return torch.zeros(len(mel) * 240)


def test_ten_minutes_take_no_more_memory_than_ten_seconds() -> None:
    """Beyond the 30,000 frames (5 minutes) at which the official mode runs out of noise."""
    model: Any = Recorder()
    codes = 626 * 48 + 59
    pieces = speak(model, [1] * codes, VocodeSettings())
    assert len(waveform(pieces)) == codes * 480
    # A window of the vocoder, and what the last pass of the DiT appends to it.
    assert model.longest <= 136 + 118


@pytest.mark.parametrize("code", [-1, 8194, 8447])
def test_a_code_outside_the_table_is_refused_and_changes_nothing(code: int) -> None:
    model, codes = tiny_token2wav(1), tiny_codes(61)
    stream = SpeechStream(model, tiny_voice(), NoiseSource(7), FAST)
    pieces = [*stream.push(codes[:50])]
    with pytest.raises(CheckpointError, match=str(code)):
        stream.push([4, code])
    pieces += [*stream.push(codes[50:]), *stream.finish()]
    assert np.array_equal(waveform(pieces), waveform(speak(model, codes, FAST)))


def test_stream_runs_on_meta_at_published_shapes() -> None:
    with torch.device("meta"):
        model = Token2Wav(OmniConfig(dit=DiTConfig(), bigvgan=BigVGANConfig()))
    voice = Voice("Any", 0, torch.zeros(1, 192), torch.zeros(1, 400, 80))
    stream = SpeechStream(model, voice, NoiseSource(0), VocodeSettings())
    pieces = [*stream.push([0] * 70), *stream.finish()]
    assert [len(piece.samples) for piece in pieces] == [76 * 240, 64 * 240]


def test_voice_from_the_file() -> None:
    cond, mel = torch.ones(1, 24, dtype=torch.float16), torch.zeros(1, 9, 80)
    voice = Voice.from_entry("Ann", {"cond": cond, "ref_mel": mel, "bos_token": torch.tensor(5)})
    assert (voice.name, voice.bos_token) == ("Ann", 5) and type(voice.bos_token) is int
    assert voice.cond.dtype == torch.float32 and torch.equal(voice.cond, cond.float())
    assert torch.equal(voice.ref_mel, mel)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cond": None}, "lacks cond"),
        ({"ref_mel": torch.zeros(1, 80)}, r"ref_mel of voice 'Ann'.*\(1, 80\).*3 axes"),
        ({"cond": torch.zeros(2, 24)}, r"cond of voice.*\(2, 24\)"),
        ({"cond": [1.0]}, "cond of voice 'Ann'.*list"),
    ],
)
def test_a_damaged_voice_is_refused(change: dict[str, Any], said: str) -> None:
    entry = {"cond": torch.zeros(1, 24), "ref_mel": torch.zeros(1, 9, 80), "bos_token": 5} | change
    with pytest.raises(CheckpointError, match=said):
        Voice.from_entry("Ann", {k: v for k, v in entry.items() if v is not None})
