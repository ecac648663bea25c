"""What utterances share: made once, kept on the host, whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_speech import tiny_codes, tiny_noise, tiny_token2wav, tiny_voice
from torch import nn

from lowvram.config import BigVGANConfig, DiTConfig, OmniConfig
from lowvram.models.constants import Constants
from lowvram.models.modulation import PassingLinear
from lowvram.models.token2wav import Token2Wav


def counted(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """The names of modules of that kind, each time one of them is called."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_only_the_first_utterance_makes_them() -> None:
    model, voice, constants = tiny_token2wav(4), tiny_voice(), Constants()
    calls = counted(model, PassingLinear, type(model.code2wav_dit_model.input_embed.spk_encoder))
    first = model.prepare(voice, constants=constants)
    once = len(calls)
    again = model.prepare(voice, constants=constants)
    assert len(calls) == once > 20
    codes, noise = tiny_codes(20), tiny_noise(20)
    wanted = model.mel(tiny_token2wav(4).prepare(voice), codes, noise)
    for utterance in (first, again):
        assert torch.equal(model.mel(utterance, codes, noise), wanted)


def test_each_grid_and_voice_has_its_own() -> None:
    model, constants = tiny_token2wav(4), Constants()
    model.prepare(tiny_voice(), constants=constants)
    assert constants.has_modulation("euler", 10) and not constants.has_modulation("rk4", 10)
    # 9 times, 26 rows of 64; two vectors of 64 for the voice.
    assert constants.nbytes == 4 * 64 * (9 * 26 + 2)
    model.prepare(tiny_voice(), "rk4", constants=constants)
    assert constants.has_modulation("rk4", 10)
    assert constants.nbytes == 4 * 64 * ((9 + 28) * 26 + 2)
    constants.clear()
    assert constants.nbytes == 0 and not constants.has_modulation("euler", 10)


@pytest.mark.parametrize("where", [0, 1, 13, 25])
def test_what_failed_half_way_is_made_anew(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, voice, constants = tiny_token2wav(4), tiny_voice(), Constants()
    forward, calls = PassingLinear.forward, []

    def failing(self: PassingLinear, *arguments: Any) -> torch.Tensor:
        calls.append(self)
        if len(calls) == where + 1:
            raise torch.OutOfMemoryError("not now")
        return forward(self, *arguments)

    monkeypatch.setattr(PassingLinear, "forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        model.prepare(voice, constants=constants)
    assert not constants.has_modulation("euler", 10)
    utterance = model.prepare(voice, constants=constants)
    assert torch.equal(utterance.modulation, tiny_token2wav(4).prepare(voice).modulation)


def test_they_are_on_the_host_whatever_the_device() -> None:
    with torch.device("meta"):
        model = Token2Wav(OmniConfig(dit=DiTConfig(), bigvgan=BigVGANConfig()))
    voice = tiny_voice()
    voice = type(voice)("Any", 0, torch.zeros(1, 192), torch.zeros(1, 40, 80))
    constants = Constants()
    utterance = model.prepare(voice, constants=constants)
    assert utterance.modulation.is_meta and utterance.speaker.conditioned.is_meta
    assert {tensor.device.type for tensor in constants.tensors} == {"cpu"}
    # 4.9 MB for the grid, 8 KB for the voice.
    assert constants.nbytes == 4 * 1024 * (9 * 134 + 2)
