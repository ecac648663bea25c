"""A tokenizer folder and small media files, made by the tests that need them."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lowvram.config import AudioConfig, ThinkerConfig, VisionConfig
from lowvram.conversation import MediaSettings, Prompt, PromptShape, Tokenizer, measure, prepare
from lowvram.pocket_vocabulary import special_ids, tokenizer_config, tokenizer_json


def write_tokenizer(folder: Path) -> Path:
    """The built-in model's tokenizer files, which have the layout of the published ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return folder


def thinker_config() -> ThinkerConfig:
    ids = special_ids()
    return ThinkerConfig(
        audio=AudioConfig(num_mel_bins=128),
        vision=VisionConfig(),
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
    )


def prepared(
    messages: Any, tokenizer: Tokenizer, speech: bool = False, **settings: Any
) -> tuple[Prompt, PromptShape]:
    """What `prepare` gives, and what `measure` gives for the same conversation."""
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "config": thinker_config(),
        "settings": MediaSettings(**settings),
        "speech": speech,
        "preprocessor": None,
    }
    return prepare(messages, **arguments), measure(messages, **arguments)


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def tone(seconds: float, rate: int = 16_000, pitch: float = 330.0) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * t * (1 + 0.2 * t))).astype(np.float32)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 20.0
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(0.2, 3, (3, 3))]
    return ((np.stack(waves, axis=2) + 1) * 127.5).astype(np.uint8)


def write_film(
    path: Path,
    *,
    frames: int = 60,
    rate: Fraction | int = 30,
    size: tuple[int, int] = (120, 160),
    codec: str | None = "libx264",
    sound: str | None = "aac",
    seconds: float = 2.0,
    channels: str = "stereo",
    sound_rate: int = 48_000,
    times: list[int] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A film whose frame i has brightness 4 * i; `times` are the frames' starts in ms."""
    import av

    with av.open(str(path), "w", options=container or {}) as film:
        video = film.add_stream(codec, rate=rate) if codec else None
        audio = film.add_stream(sound, rate=sound_rate, layout=channels) if sound else None
        if video is not None:
            video.height, video.width = size
            video.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            if times:
                video.codec_context.time_base = Fraction(1, 1000)
            for i in range(frames):
                image = np.full((*size, 3), min(255, 4 * i), np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                if times:
                    frame.pts, frame.time_base = times[i], Fraction(1, 1000)
                film.mux(video.encode(frame))
            film.mux(video.encode(None))
        if audio is not None:
            _write_sound(film, audio, tone(seconds, sound_rate), channels, sound_rate)
    return path


def _write_sound(film: Any, stream: Any, wave: np.ndarray, layout: str, rate: int) -> None:
    import av

    shaper = av.AudioResampler(stream.format, layout, rate, stream.frame_size or 1024)
    planes = np.tile(wave, (len(av.AudioLayout(layout).channels), 1))
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    for shaped in (*shaper.resample(frame), *shaper.resample(None)):
        film.mux(stream.encode(shaped))
    film.mux(stream.encode(None))


def wav_bytes(samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, samples, rate, subtype=subtype, format="WAV")
    return out.getvalue()
