"""The whole request against transformers: tokens, codes and waveform, for every mix of media."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowvram import LowVRAMOmni
from lowvram.conversation import MediaSettings, Prompt, prepare
from lowvram.engine.run import Seeds
from lowvram.pocket import make_checkpoint

MEDIA = Path(__file__).parents[2] / "demos" / "media"
SECONDS = 0.8
CODES = int(SECONDS * 50)


def tone(seconds: float, pitch: float) -> np.ndarray:
    t = np.arange(int(seconds * 16000)) / 16000
    return (0.3 * np.sin(2 * np.pi * pitch * t * (1 + 0.1 * t))).astype(np.float32)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(seed: int, height: int = 84, width: int = 112) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed, height, width)}


def audio(seconds: float, pitch: float = 220.0) -> dict[str, Any]:
    return {"type": "audio", "audio": tone(seconds, pitch)}


def video(frames: int, seed: int) -> dict[str, Any]:
    return {"type": "video", "video": np.stack([picture(seed + i, 56, 84) for i in range(frames)])}


CLIP = {"type": "video", "video": str(MEDIA / "clip.mp4"), "max_frames": 6}

MIXES = {
    "text": [text("hello there")],
    "image": [image(1), text("what is this?")],
    "audio": [audio(3.3), text("who speaks?")],
    "video": [video(4, 10), text("what happens?")],
    "several": [
        image(2),
        audio(0.7),
        text("and"),
        image(3, 56, 140),
        video(6, 20),
        audio(2.5),
        text("?"),
    ],
    "heard video": [CLIP, text("what is said?")],
    "heard video among others": [image(5), CLIP, audio(1.1), text("and what now?")],
}


@pytest.fixture(scope="module", params=[3, 11], ids=lambda seed: f"weights{seed}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    make_checkpoint(path, seed=request.param, dtype="float32")
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import Qwen2_5OmniForConditionalGeneration

    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.talker.forward = masked(model.talker.forward)
    return model


def masked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The Talker's forward with the attention mask that 5.23 no longer hands to it.

    `generate` of 5.23 drops a mask of ones, and the Talker takes a missing mask as a sign that
    there is nothing to prepare: it then runs without its start and pad codes, and with positions
    that ignore the media. In 5.17, and with any padding, the mask is there.
    """

    @functools.wraps(forward)
    def call(**kwargs: Any) -> Any:
        if kwargs.get("attention_mask") is None:
            new = kwargs["inputs_embeds"] if kwargs["input_ids"] is None else kwargs["input_ids"]
            seen = kwargs["past_key_values"].get_seq_length() + new.shape[1]
            kwargs["attention_mask"] = torch.ones(1, seen, dtype=torch.long)
        return forward(**kwargs)

    return call


@pytest.fixture(scope="module")
def ours(folder: Path) -> LowVRAMOmni:
    return LowVRAMOmni.from_pretrained(folder, device="cpu", dtype="float32", kernel="reference")


def their_inputs(prompt: Prompt) -> dict[str, Any]:
    """The prompt's tensors under the names that transformers' `generate` takes.

    Pixels go to the Thinker by name: 5.23 would hand them to the Talker, which refuses them.
    """
    ids = torch.from_numpy(prompt.ids)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stills = [item for item in prompt.vision if item.grid[0] == 1]
    moving = [item for item in prompt.vision if item.grid[0] > 1]
    for suffix, grid, items in (("", "image", stills), ("_videos", "video", moving)):
        if items:
            pairs = [item.patches(i) for item in items for i in range(item.grid[0])]
            inputs[f"thinker_pixel_values{suffix}"] = torch.from_numpy(np.concatenate(pairs))
            inputs[f"{grid}_grid_thw"] = torch.tensor([item.grid for item in items])
    if moving:
        inputs["video_second_per_grid"] = torch.tensor([item.seconds_per_grid for item in moving])
    if prompt.audio:
        longest = max(item.features.shape[1] for item in prompt.audio)
        padded = np.zeros(
            (len(prompt.audio), prompt.audio[0].features.shape[0], longest), np.float32
        )
        mask = np.zeros((len(prompt.audio), longest), np.int64)
        for row, item in enumerate(prompt.audio):
            frames = item.features.shape[1]
            padded[row, :, :frames] = item.features
            mask[row, :frames] = 1
        inputs["input_features"] = torch.from_numpy(padded)
        inputs["feature_attention_mask"] = torch.from_numpy(mask)
    return inputs


@pytest.mark.oracle
@pytest.mark.parametrize("mix", MIXES)
def test_tokens_codes_and_waveform_are_those_of_transformers(
    mix: str, folder: Path, theirs: Any, ours: LowVRAMOmni, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = [{"role": "user", "content": MIXES[mix]}]
    prompt = prepare(
        conversation,
        tokenizer=ours.checkpoint.tokenizer(),
        config=ours.checkpoint.config.thinker,
        settings=MediaSettings(),
        speech=True,
        preprocessor=ours.checkpoint.preprocessor,
    )
    heard: dict[str, torch.Tensor] = {}
    vocode = theirs.token2wav.forward

    def listen(code: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        heard["codes"] = code
        torch.manual_seed(Seeds.of_request(7).noise)
        return vocode(code, **kwargs)

    monkeypatch.setattr(theirs.token2wav, "forward", listen)
    with torch.no_grad():
        sequences, wave = theirs.generate(
            **their_inputs(prompt),
            speaker="Ethan",
            thinker_max_new_tokens=12,
            thinker_do_sample=False,
            talker_do_sample=False,
            talker_max_new_tokens=CODES,
            use_audio_in_video="heard" in mix,
        )
    result = ours.generate(
        conversation,
        speaker="Ethan",
        max_new_tokens=12,
        max_speech_seconds=SECONDS,
        talker_temperature=0.0,
        solver="rk4",
        whole_speech=True,
        seed=7,
    )
    assert list(result.tokens) == sequences[0, prompt.ids.size :].tolist()
    assert list(result.codes) == heard["codes"][0].tolist()
    assert result.audio is not None
    np.testing.assert_allclose(result.audio, wave.numpy(), atol=1e-4)
