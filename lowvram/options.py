"""What a request takes by name, and how that becomes settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from lowvram.conversation import MediaSettings
from lowvram.errors import UsageError
from lowvram.settings import PIECES, TALKER_SAMPLING, GenerationSettings, SamplingSettings, Solver

Conversation = Sequence[Mapping[str, Any]]
"""Messages in the format of the model cards: `role`, and `content` as text or as a list of
`{"type": "text" | "image" | "audio" | "video", ...}`; media as path, http(s) or data URL, bytes,
PIL image or numpy array."""


class Options(TypedDict, total=False):
    """What `plan`, `generate` and `stream` take by name, all optional.

    `speaker`: a voice by name (the checkpoint's first). `return_audio`: speak or not (as loaded).
    `max_new_tokens`, `max_speech_seconds`: bounds of the reply, which size its memory (the
    checkpoint's own).
    `temperature` (0 is greedy), `top_p`, `top_k`, `repetition_penalty`: how text is drawn; the
    same with `talker_` before it: how codes are drawn.
    `seed`: of this request (that of the model). `solver`: `euler` or `rk4`. `whole_speech`: the
    sound of an utterance that is vocoded at once, for files (False). `pieces`: blocks of 0.24 s in
    the pieces of speech, the last number again and again; `look_ahead`: those that a piece hears of
    what follows. `say`: this text is the
    reply, and is spoken; no other is drawn. `system`: a system prompt for conversations without
    one. `fps`, `max_frames`, `min_pixels`, `max_pixels`: how video and images are sampled.
    `use_audio_in_video`: hear the sound track of videos (True).
    """

    speaker: str | None
    return_audio: bool | None
    max_new_tokens: int | None
    max_speech_seconds: float | None
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    talker_temperature: float
    talker_top_p: float
    talker_top_k: int
    talker_repetition_penalty: float
    seed: int | None
    solver: Solver
    whole_speech: bool
    pieces: Sequence[int]
    look_ahead: int
    say: str | None
    system: str | None
    fps: float
    max_frames: int
    min_pixels: int | None
    max_pixels: int | None
    use_audio_in_video: bool


_MEDIA = {"fps", "max_frames", "min_pixels", "max_pixels"}
_SAMPLING = {"temperature", "top_p", "top_k", "repetition_penalty"}
_REQUEST = {
    "speaker",
    "max_new_tokens",
    "max_speech_seconds",
    "solver",
    "whole_speech",
    "look_ahead",
}


def split_options(
    options: Options, *, seed: int, speech: bool
) -> tuple[GenerationSettings, MediaSettings]:
    """Settings of the request and of its media; `seed` and `speech` are those of the model.

    Raises:
        UsageError: an unknown name, a value out of range, or speech from a model that has none.
    """
    given: dict[str, Any] = dict(options)
    known = Options.__optional_keys__
    if unknown := given.keys() - known:
        raise UsageError(
            f"unknown option {min(unknown)!r}; wanted some of {', '.join(sorted(known))}"
        )
    if given.get("return_audio") and not speech:
        raise UsageError(
            "return_audio is set, but this model was loaded without speech or has none; "
            "load it with speech=True, or a checkpoint with a Talker"
        )
    if given.get("say") is not None:
        _check_say(given["say"], speech=speech and given.get("return_audio") is not False)
    wanted = given.get("return_audio")
    own_seed = given.get("seed")
    settings = GenerationSettings(
        **_picked(given, _REQUEST),
        pieces=_pieces(given.get("pieces", PIECES)),
        speech=speech if wanted is None else wanted,
        seed=seed if own_seed is None else own_seed,
        sampling=replace(SamplingSettings(), **_picked(given, _SAMPLING)),
        talker_sampling=replace(TALKER_SAMPLING, **_picked(given, _SAMPLING, "talker_")),
    )
    media = _picked(given, _MEDIA)
    if "use_audio_in_video" in given:
        media["audio_in_video"] = given["use_audio_in_video"]
    return settings, MediaSettings(**media)


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation, led by that system prompt unless it brings its own.

    What is no list of messages is left as it is, for whoever reads it to say so.
    """
    if system is None or not isinstance(conversation, list | tuple) or not conversation:
        return conversation
    first = conversation[0]
    if isinstance(first, Mapping) and first.get("role") == "system":
        return conversation
    return [{"role": "system", "content": system}, *conversation]


def repeating(text: str) -> list[Mapping[str, Any]]:
    """The question to which `text` is the reply, for a text that is to be spoken."""
    return [{"role": "user", "content": f"Repeat after me, word for word: {text}"}]


def _picked(given: Mapping[str, Any], names: set[str], prefix: str = "") -> dict[str, Any]:
    """Those of `names` that were given under `prefix`, without it."""
    return {name: given[prefix + name] for name in names if prefix + name in given}


def _check_say(text: object, *, speech: bool) -> None:
    if not speech:
        raise UsageError(
            "say is set, but nothing is to be spoken; use a model with a Talker, and leave "
            "speech and return_audio on"
        )
    if not isinstance(text, str):
        raise UsageError(f"say is a {type(text).__name__}; wanted the text that is to be spoken")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"say is no Unicode text: character {error.start} is none; wanted text in UTF-8"
        ) from error


def _pieces(value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UsageError(f"pieces is {value!r}; wanted a list of blocks, as in [2, 2, 4, 8]")
    return tuple(value)
