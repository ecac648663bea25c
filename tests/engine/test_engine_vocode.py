"""Speech in pieces: which passes run, that they cover everything once, and what they sound like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_speech import tiny_codes, tiny_token2wav, tiny_voice

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


def test_passes_of_the_defaults() -> None:
    """Two blocks of 12 codes twice, then four, then eights, each before a block of look-ahead;
    frames with 20 on both sides; the rest when it ends. The first sound takes 36 codes and is
    28 frames (0.28 s) long."""
    assert list(passes(VocodeSettings(), 130)) == [
        Pass("mel", 0, 36, 0, 24),
        Pass("wave", 0, 48, 0, 28),
        Pass("mel", 24, 60, 24, 48),
        Pass("wave", 8, 96, 28, 76),
        Pass("mel", 48, 108, 48, 96),
        Pass("wave", 56, 192, 76, 172),
        Pass("mel", 96, 130, 96, 130),
        Pass("wave", 152, 260, 172, 260),
    ]
    mel = [step for step in passes(VocodeSettings(), 1000) if step.stage == "mel"]
    assert [step.keep_to - step.keep_from for step in mel] == [24, 24, 48, *[96] * 9, 40]
    assert sum(step.length for step in mel) <= 1.25 * 1000


def test_passes_of_the_exact_sound() -> None:
    """Every code comes in once, and its frames are finished nine blocks later."""
    exact = VocodeSettings(exact=True)
    assert list(passes(exact, 130)) == [
        Pass("mel", 0, 24, 0, 0, 2),
        Pass("mel", 24, 48, 0, 0, 2),
        Pass("mel", 48, 96, 0, 0, 4),
        Pass("mel", 96, 130, 0, 84, 8),
        Pass("wave", 0, 168, 0, 134),
        Pass("mel", 130, 130, 84, 130, 4),
        Pass("wave", 100, 260, 134, 260),
    ]
    assert exact.first_codes() == 193 and replace(exact, solver="rk4").first_codes() == 481
    assert VocodeSettings().first_codes() == 36


settings_strategy = st.builds(
    VocodeSettings,
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    look_ahead=st.integers(0, 3),
    vocoder_left_frames=st.integers(0, 40),
    vocoder_right_frames=st.integers(0, 40),
    exact=st.booleans(),
    time_points=st.integers(2, 10),
)


@settings(deadline=None)
@given(settings_strategy, st.integers(0, 400))
def test_passes_cover_everything_once_with_their_context(s: VocodeSettings, codes: int) -> None:
    done = {"mel": 0, "wave": 0}
    sizes = iter(s.blocks)
    size = front = came = 0
    for step in passes(s, codes):
        end = codes if step.stage == "mel" else 2 * codes
        assert step.keep_from == done[step.stage] < step.keep_to + (step.blocks > 0)
        done[step.stage] = step.keep_to
        if step.stage == "mel" and s.exact:
            size = next(sizes, size)
            behind = 12 * (s.evaluations - (front := front + step.blocks))
            assert step.start == came and step.stop == min(codes, 12 * front)
            assert step.blocks <= size and step.keep_to == min(codes, max(0, -behind))
            came = step.stop
        elif step.stage == "mel":
            size = next(sizes, size)
            assert step.start == step.keep_from and step.start % 12 == 0
            regular = step.stop - step.keep_to == 12 * s.look_ahead and step.keep_to < end
            assert step.keep_to - step.start == 12 * size if regular else step.stop == end
            assert step.length <= 12 * (size + s.look_ahead)
        else:
            assert step.start == max(0, step.keep_from - s.left_frames)
            ready = min(end, step.keep_to + s.right_frames)
            assert step.stop == ready <= 2 * done["mel"]
        frames = step.length * (2 if step.stage == "mel" else 1)
        assert frames <= s.largest_pass(codes)[step.stage == "wave"]
    assert done == {"mel": codes, "wave": 2 * codes}


@settings(deadline=None)
@given(settings_strategy, st.integers(1, 300))
def test_the_largest_pass_is_reached(s: VocodeSettings, codes: int) -> None:
    """By speech of that many codes or fewer."""
    steps = [(step, count) for count in range(1, codes + 1) for step in passes(s, count)]
    mel = max(
        min(12 * step.blocks, count) if s.exact else step.length
        for step, count in steps
        if step.stage == "mel"
    )
    wave = max(step.length for step, _ in steps if step.stage == "wave")
    assert s.largest_pass(codes) == (2 * mel, wave)


@settings(deadline=None)
@given(settings_strategy, st.integers(1, 300))
def test_the_largest_pass_before_speech_ends(s: VocodeSettings, codes: int) -> None:
    schedule, mel, wave = Schedule(s), 0, 0
    for _ in range(codes):
        schedule.add(1)
        while step := schedule.next():
            schedule.done(step)
            length = 12 * step.blocks if s.exact else step.length
            mel = max(mel, length * 2 * (step.stage == "mel"))
            wave = max(wave, step.length * (step.stage == "wave"))
    found = s.largest_pass(codes, ended=False)
    assert found == (mel, wave)
    assert found[0] <= s.largest_pass(codes)[0] and found[1] <= s.largest_pass(codes)[1]


def test_passes_of_long_speech_are_as_long_as_those_of_short() -> None:
    assert (
        VocodeSettings().largest_pass(180_000) == VocodeSettings().largest_pass(300) == (216, 232)
    )
    exact = VocodeSettings(exact=True)
    assert exact.largest_pass(180_000) == exact.largest_pass(300) == (192, 260)


@settings(deadline=None)
@given(settings_strategy, st.lists(st.integers(0, 90), max_size=8))
@example(VocodeSettings(look_ahead=0), [24])
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
        {"blocks": ()},
        {"blocks": (2, 0)},
        {"look_ahead": -1},
        {"vocoder_right_frames": -1},
        {"time_points": 1},
        {"solver": "heun"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="wanted"):
        VocodeSettings(**wrong)


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


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 59, 60, 61, 130])
def test_480_samples_a_code_and_every_code_once(count: int, exact: bool) -> None:
    codes = tiny_codes(count)
    pieces = speak(tiny_token2wav(1), codes, VocodeSettings(time_points=2, exact=exact))
    samples = 0
    for i, piece in enumerate(pieces):
        samples += len(piece.samples)
        ended = sum((p.codes for p in pieces[: i + 1]), ())
        assert ended == tuple(codes[: samples // 480])
        assert piece.samples.dtype == np.float32 and len(piece.samples)
    assert samples == 480 * count


@pytest.mark.parametrize("settings", [FAST, VocodeSettings(time_points=2, exact=True)])
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


def whole_wave(model: Token2Wav, codes: list[int], settings: VocodeSettings) -> np.ndarray:
    """The utterance made at once, from the noise of `speak`."""
    utterance = model.prepare(tiny_voice(), settings.solver, settings.time_points)
    noise = NoiseSource(7).window(0, 2 * len(codes))
    return model.wave(model.mel(utterance, codes, noise)).numpy()


@pytest.mark.parametrize(("solver", "points"), [("euler", 10), ("rk4", 3)])
@pytest.mark.parametrize("count", [1, 13, 100, 337])
def test_exact_pieces_are_the_whole(solver: Any, points: int, count: int) -> None:
    model, codes = tiny_token2wav(1), tiny_codes(count)
    exact = VocodeSettings(solver=solver, time_points=points, exact=True)
    whole = whole_wave(model, codes, exact)
    assert whole.std() > 0.03
    assert np.abs(waveform(speak(model, codes, exact)) - whole).max() < 1e-4


@pytest.mark.parametrize(("solver", "points", "ahead"), [("euler", 4, 3), ("rk4", 2, 4)])
@pytest.mark.parametrize("count", [35, 115, 250])
def test_pieces_are_the_whole_to_rounding(solver: Any, points: int, ahead: int, count: int) -> None:
    """With a block ahead for each evaluation of the DiT, and all the frames the vocoder hears."""
    model, codes = tiny_token2wav(1), tiny_codes(count)
    full = VocodeSettings(
        solver=solver,
        time_points=points,
        look_ahead=ahead,
        vocoder_left_frames=34,
        vocoder_right_frames=34,
    )
    whole = whole_wave(model, codes, full)
    assert whole.std() > 0.1
    assert np.abs(waveform(speak(model, codes, full)) - whole).max() < 5e-5
    if count == 250:
        short = replace(full, look_ahead=0)
        assert np.abs(waveform(speak(model, codes, short)) - whole).max() > 1e-3


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_the_defaults_are_close_to_the_whole(solver: Any) -> None:
    model, codes = tiny_token2wav(1, std=0.08), tiny_codes(150)
    whole = whole_wave(model, codes, VocodeSettings(solver=solver))
    pieces = waveform(speak(model, codes, VocodeSettings(solver=solver)))
    assert 0 < np.sqrt(np.mean((pieces - whole) ** 2)) < 1e-3 * whole.std()


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 9), ("rk4", 36)])
def test_what_is_constant_is_computed_once(solver: Any, evaluations: int) -> None:
    model, calls = tiny_token2wav(1), {"dit": 0, "speaker": 0, "time": 0, "modulation": 0}
    dit = model.code2wav_dit_model
    for name, module in {
        "dit": dit,
        "speaker": dit.input_embed.spk_encoder,
        "time": dit.time_embed,
        "modulation": dit.transformer_blocks[1].get_submodule("attn_norm"),
    }.items():

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        module.register_forward_hook(count)
    settings = VocodeSettings(solver=solver)
    speak(model, tiny_codes(130), settings)
    assert settings.evaluations == evaluations
    assert calls == {"dit": 4 * evaluations, "speaker": 1, "time": 1, "modulation": 1}


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
    assert [len(piece.samples) for piece in pieces] == [28 * 240, 48 * 240, 64 * 240]


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
