"""The two ways through this room: everything decoded, or everything measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowvram.config import ThinkerConfig
from lowvram.conversation.audio import (
    audio_frames,
    load_audio,
    load_sound_track,
    sound_track_frames,
)
from lowvram.conversation.image import image_size, load_image
from lowvram.conversation.imagined import most_tokens, shape_of
from lowvram.conversation.mel import log_mel
from lowvram.conversation.messages import (
    Media,
    Message,
    media_of,
    parse_messages,
    with_speech_prompt,
)
from lowvram.conversation.pixels import BICUBIC, PixelFormat
from lowvram.conversation.prompt import (
    AudioInput,
    MediaShape,
    Prompt,
    PromptShape,
    VisionInput,
    lay_out,
)
from lowvram.conversation.settings import MediaSettings
from lowvram.conversation.tokenizer import Tokenizer
from lowvram.conversation.tokens import HOP, SAMPLE_RATE
from lowvram.conversation.video import load_video, sample_video
from lowvram.errors import CheckpointError


def prepare(
    messages: object,
    *,
    tokenizer: Tokenizer,
    config: ThinkerConfig,
    settings: MediaSettings,
    speech: bool,
    preprocessor: Mapping[str, Any] | None,
) -> Prompt:
    """Decode a conversation's media and lay out its prompt.

    `messages`: see `parse_messages`. `preprocessor`: `preprocessor_config.json`, None for the
    published values. With `speech` the system prompt that speech needs is set where no system
    message leads; without it the chat template's own applies ("You are a helpful assistant.").

    Raises:
        UsageError: a malformed conversation. MediaError: a medium that cannot be used.
        CheckpointError: tokenizer, template, preprocessor and config do not belong together.
    """
    parsed = _parse(messages, settings, speech)
    pixels = _formats(preprocessor, config)
    loaded = [_load(media, pixels, config) for media in media_of(parsed)]
    layout = lay_out(parsed, [item.shape for item in loaded], tokenizer, config)
    seen = [item for item in loaded if item.frames is not None]
    heard = [item.features for item in loaded if item.features is not None]
    return Prompt(
        ids=layout.ids,
        positions=layout.positions,
        next_position=layout.next_position,
        vision=tuple(
            VisionInput(item.shape.grid, slots, item.frames, pixels, item.shape.seconds_per_grid)
            for item, slots in zip(seen, layout.vision_slots, strict=True)
            if item.shape.grid is not None and item.frames is not None
        ),
        audio=tuple(
            AudioInput(features, slots)
            for features, slots in zip(heard, layout.audio_slots, strict=True)
        ),
    )


def measure(
    messages: object,
    *,
    tokenizer: Tokenizer,
    config: ThinkerConfig,
    settings: MediaSettings,
    speech: bool,
    preprocessor: Mapping[str, Any] | None,
) -> PromptShape:
    """The shape that `prepare` would give, from headers; compressed sound is decoded to be counted.

    Raises:
        UsageError, MediaError, CheckpointError: as `prepare`, as far as headers show it.
    """
    parsed = _parse(messages, settings, speech)
    shapes = _media_shapes(parsed, config, preprocessor)
    layout = lay_out(parsed, shapes, tokenizer, config)
    return PromptShape(
        tokens=len(layout.ids),
        next_position=layout.next_position,
        grids=tuple(shape.grid for shape in shapes if shape.grid is not None),
        audio_frames=tuple(s.audio_frames for s in shapes if s.audio_frames is not None),
    )


def measure_without_tokenizer(
    messages: object, *, config: ThinkerConfig, settings: MediaSettings, speech: bool
) -> PromptShape:
    """As `measure`, with every byte of text taken for a token: never less than that gives.

    Raises:
        UsageError, MediaError: as `measure`.
    """
    parsed = _parse(messages, settings, speech)
    return shape_of(_media_shapes(parsed, config, None), most_tokens(parsed), config)


@dataclass(frozen=True, eq=False)
class _Loaded:
    shape: MediaShape
    frames: np.ndarray | None = None
    features: np.ndarray | None = None


def _parse(messages: object, settings: MediaSettings, speech: bool) -> tuple[Message, ...]:
    parsed = parse_messages(messages, settings)
    return with_speech_prompt(parsed) if speech else parsed


def _media_shapes(
    parsed: tuple[Message, ...], config: ThinkerConfig, preprocessor: Mapping[str, Any] | None
) -> list[MediaShape]:
    pixels = _formats(preprocessor, config)
    return [_measure(media, pixels) for media in media_of(parsed)]


def _formats(preprocessor: Mapping[str, Any] | None, config: ThinkerConfig) -> PixelFormat:
    published = {
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP,
        "n_fft": 400,
        "feature_size": config.audio.num_mel_bins,
    }
    for name, wanted in published.items():
        found = (preprocessor or {}).get(name, wanted)
        if found != wanted:
            raise CheckpointError(
                f"preprocessor_config.json has {name} {found}; wanted {wanted}: take the file "
                "from the same checkpoint"
            )
    return PixelFormat.read(preprocessor, config.vision)


def _load(media: Media, pixels: PixelFormat, config: ThinkerConfig) -> _Loaded:
    bins = config.audio.num_mel_bins
    if media.kind == "audio":
        features = log_mel(load_audio(media.value), bins)
        return _Loaded(MediaShape("audio", audio_frames=features.shape[1]), features=features)
    if media.kind == "image":
        label, image = load_image(media.value)
        height, width = _image_target(label, (image.height, image.width), media, pixels)
        still = np.asarray(image.resize((width, height), BICUBIC))[None]
        return _Loaded(MediaShape("image", pixels.grid(height, width, 1)), frames=still)
    sampling, frames = load_video(media.value, media.settings, pixels)
    waveform = load_sound_track(media.value) if media.settings.audio_in_video else None
    sound = None if waveform is None else log_mel(waveform, bins)
    shape = MediaShape(
        "video",
        pixels.grid(*sampling.size, sampling.frames),
        None if sound is None else sound.shape[1],
        sampling.seconds_per_grid,
    )
    return _Loaded(shape, frames, sound)


def _measure(media: Media, pixels: PixelFormat) -> MediaShape:
    if media.kind == "audio":
        return MediaShape("audio", audio_frames=audio_frames(media.value))
    if media.kind == "image":
        target = _image_target(*image_size(media.value), media, pixels)
        return MediaShape("image", pixels.grid(*target, 1))
    sampling = sample_video(media.value, media.settings, pixels)
    heard = sound_track_frames(media.value) if media.settings.audio_in_video else None
    grid = pixels.grid(*sampling.size, sampling.frames)
    return MediaShape("video", grid, heard, sampling.seconds_per_grid)


def _image_target(
    label: str, size: tuple[int, int], media: Media, pixels: PixelFormat
) -> tuple[int, int]:
    return pixels.fit(label, size, media.settings.pixel_range(*pixels.image_pixels))
