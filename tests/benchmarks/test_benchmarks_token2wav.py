"""The benchmark of token2wav, on a network that takes no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_speech import drawing, tiny_noise

from lowvram.config import BigVGANConfig, DiTConfig, OmniConfig
from lowvram.models.token2wav import Token2Wav

FOLDER = Path(__file__).parents[2] / "benchmarks"
DIT = DiTConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=16,
    emb_dim=16,
    look_ahead_layers=(1,),
    look_backward_layers=(0, 2),
    enc_dim=16,
    enc_emb_dim=24,
    enc_channels=(16, 16, 16, 16, 48),
    enc_attention_channels=8,
    enc_se_channels=8,
)
VOCODER = BigVGANConfig(
    upsample_initial_channel=64, resblock_kernel_sizes=(7,), resblock_dilation_sizes=((1, 3, 5),)
)
CONFIG = OmniConfig(dit=DIT, bigvgan=VOCODER)
PER_FRAME = 240


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what lies beside them."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


@pytest.fixture(scope="module")
def model() -> Token2Wav:
    return made(std=0.1)


def made(std: float) -> Token2Wav:
    import token2wav_model

    return token2wav_model.random_token2wav(DIT, VOCODER, 3, std)


def test_rows_tell_speed_work_and_first_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import token2wav

    path = tmp_path / "a.json"
    ours = ["default", "exact", "whole", "official", "bf16"]
    assert token2wav.main(["--seconds", "1.4", "--rows", *ours, "--json", str(path)], CONFIG) == 0
    told = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == ours
    for row in rows.values():
        assert row["samples"] == 70 * 480
        assert 0 < row["vocoder_s"] < row["vocoder_s"] + row["dit_s"] <= row["seconds"] * 1.001
        assert 0 < row["first_sound_s"] <= row["seconds"]
        assert row["real_time_factor"] == pytest.approx(row["seconds"] / 1.4)
    first = {
        name: (row["first_sound_codes"], row["first_sound_samples"]) for name, row in rows.items()
    }
    assert first["default"] == first["bf16"] == (36, 28 * PER_FRAME)
    assert first["official"] == (60, 76 * PER_FRAME)
    assert first["whole"] == (70, 70 * 480)
    assert rows["whole"]["work"] == 1 == pytest.approx(rows["exact"]["work"], rel=0.02)
    # 72 and 72 frames, then 44 of 140; 120 frames, then 92.
    assert rows["default"]["work"] == pytest.approx((72 + 72 + 44) / 140, rel=0.02)
    assert rows["official"]["work"] == pytest.approx((120 + 92) / 140, rel=0.02)
    assert rows["bf16"]["dit_operations"] == rows["default"]["dit_operations"]
    work = told["work_over_20_s"]
    assert 1.1 < work["default"] < 1.2 < 1.6 < work["official"] < 1.75
    printed = capsys.readouterr().out
    assert "official takes" in printed and "transformers" not in printed


def test_operations_are_those_of_the_matrices() -> None:
    """One block of 24 frames, nine evaluations, two branches."""
    import token2wav_count
    import token2wav_model
    import token2wav_rows

    voice = token2wav_model.random_voice(DIT, 0)
    counter = token2wav_count.Counter(CONFIG, voice)
    counted = counter.operations(12, token2wav_rows.whole)
    width, frames = DIT.hidden_size, 24
    layer = 2 * frames * (4 + 2 * DIT.ff_mult) * width**2 + 2 * 2 * frames * frames * width
    ends = 2 * frames * 80 * width
    assert counted.dit == 9 * (2 * DIT.num_hidden_layers * layer + ends + 2 * ends)
    longer = counter.operations(24, token2wav_rows.whole)
    assert longer.vocoder == pytest.approx(2 * counted.vocoder, rel=0.01)


def test_peaks_of_shorter_and_longer_speech(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import token2wav_memory

    path = tmp_path / "a.json"
    arguments = ["--seconds", "0.04", "0.3", "--modes", "default", "--json", str(path)]
    assert token2wav_memory.main(arguments, CONFIG) == 0
    found = json.loads(path.read_text())["modes"]["default"]
    peaks = found["peak_bytes"]
    assert 0 < peaks["0.04"] < peaks["0.3"]
    assert found["grown"] == peaks["0.3"] / peaks["0.04"]
    assert "MiB for 0.3 s" in capsys.readouterr().out


def test_passes_with_the_official_constants() -> None:
    from token2wav_model import official_pass

    found = [official_pass(done, 151) for done in (0, 48, 96)]
    windows = [(one.start, one.stop, one.keep_from, one.keep_to) for one in found]
    assert windows == [(0, 60, 0, 48), (24, 108, 48, 96), (72, 151, 96, 151)]
    assert official_pass(0, 59).stop == official_pass(0, 59).keep_to == 59
    assert (official_pass(0, 60).stop, official_pass(0, 60).keep_to) == (60, 48)


@pytest.mark.parametrize("count", [1, 59, 60, 120, 151])
def test_sound_with_the_official_constants(model: Token2Wav, count: int) -> None:
    """Its frames through the vocoder at once: nothing is lost or doubled at a seam."""
    import token2wav_model
    import token2wav_rows

    voice, codes = token2wav_model.random_voice(DIT, 1), token2wav_model.random_codes(count, 2)
    noise = token2wav_rows.NoiseSource(0).window(0, 2 * count)
    chunks = list(token2wav_rows.official(model, voice)(iter(codes)))
    mel = token2wav_model.official_mel(model, model.prepare(voice), codes, noise)
    wanted = model.wave(mel).numpy()
    assert len(chunks) == max(1, -(-(count - 11) // 48))
    assert np.abs(np.concatenate(chunks) - wanted).max() < 1e-4 < wanted.std()
    whole = np.concatenate(list(token2wav_rows.whole(model, voice)(iter(codes))))
    if count < 60:
        assert np.array_equal(whole, np.concatenate(chunks))


@pytest.mark.oracle
def test_theirs_are_the_same_weights_and_voice() -> None:
    import token2wav_model
    import token2wav_rows

    model = made(std=0.1)
    voice, codes = token2wav_model.random_voice(DIT, 1), token2wav_model.random_codes(20, 2)
    theirs = token2wav_rows.Theirs(CONFIG, model, voice, steps=9)
    with drawing(tiny_noise(20)):
        (samples,) = theirs.run(iter(codes))
    wanted = model(codes, voice, tiny_noise(20), "rk4").numpy()
    assert np.abs(samples - wanted).max() < 3e-5 < wanted.std()
    assert theirs.attention == "sdpa"
    calls: list[int] = []
    one_step = token2wav_rows.Theirs(CONFIG, model, voice, steps=1)
    dit = one_step.model.code2wav_dit_model
    dit.register_forward_pre_hook(lambda *_: calls.append(1))
    list(one_step.run(iter(codes)))
    assert len(calls) == 4
