"""Token2wav with small random weights: ours alone, or paired with the transformers class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config
from torch import Tensor

from lowvram.config import OmniConfig
from lowvram.engine.voice import Voice
from lowvram.models.token2wav import Token2Wav


def speech_config(**dit: Any) -> dict[str, Any]:
    """The tiny `config.json` with fields of the DiT replaced."""
    raw = tiny_config()
    raw["token2wav_config"]["dit_config"].update(dit)
    return raw


def tiny_token2wav(seed: int, std: float = 0.1, **dit: Any) -> Token2Wav:
    """Ours, every parameter normal with this deviation (above 0.15 the flow becomes chaotic)."""
    model = Token2Wav(OmniConfig.from_dict(speech_config(**dit)))
    _randomise(model, seed, std)
    return model


def token2wav_pair(folder: Path, seed: int, std: float = 0.1, **dit: Any) -> tuple[Any, Token2Wav]:
    """The transformers model, and ours filled by name from what that one saves."""
    from safetensors.torch import load_file
    from transformers import Qwen2_5OmniConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavModel

    raw = speech_config(**dit)
    config = Qwen2_5OmniConfig(**raw).token2wav_config
    theirs = Qwen2_5OmniToken2WavModel._from_config(config, dtype=torch.float32).eval()
    theirs.requires_grad_(False)
    _randomise(theirs, seed, std)
    theirs.save_pretrained(folder)
    ours = Token2Wav(OmniConfig.from_dict(raw))
    ours.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return theirs, ours


def _randomise(model: torch.nn.Module, seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, std, generator=generator)


def tiny_voice(seed: int = 0, frames: int = 31) -> Voice:
    generator = torch.Generator().manual_seed(seed)
    return Voice(
        name="Tiny",
        bos_token=3,
        cond=torch.randn(1, 24, generator=generator),
        ref_mel=torch.randn(1, frames, 80, generator=generator),
    )


def tiny_codes(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 8194, (count,), generator=generator).tolist()


def tiny_noise(codes: int, seed: int = 0) -> Tensor:
    """[2 * codes, 80]"""
    return torch.randn(2 * codes, 80, generator=torch.Generator().manual_seed(seed))


@contextmanager
def drawing(noise: Tensor) -> Iterator[None]:
    """Makes `torch.randn`, from which transformers takes the start of the flow, give `noise`.

    transformers draws [1, frames, mel], in some releases for more frames than it then uses.
    """
    original = torch.randn

    def fixed(*shape: Any, **options: Any) -> Tensor:
        full = torch.zeros(*shape, dtype=options.get("dtype"))
        full[0, : len(noise)] = noise
        return full

    torch.randn = fixed
    try:
        yield
    finally:
        torch.randn = original
