"""From flags to a request: the conversation, the settings, and the model they are meant for."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowvram.cli.arguments import POCKET
from lowvram.conversation import MediaSettings
from lowvram.errors import LowVRAMError, UsageError
from lowvram.options import Options, repeating, split_options
from lowvram.planner import check_options
from lowvram.settings import GenerationSettings

if TYPE_CHECKING:
    from lowvram.checkpoint import Checkpoint
    from lowvram.omni import LowVRAMOmni

Part = dict[str, str]
Message = dict[str, Any]

MEDIA = ("image", "audio", "video")

GREETING = "Hello! Who are you?"
"""What is asked when nothing was: of the built-in model, and by `plan`."""

NOISE = "the built-in model is tiny and untrained: its words and voice are noise"


@dataclass(frozen=True)
class Request:
    """One request, checked as far as the flags alone allow.

    `options` are those of `LowVRAMOmni.plan`, `.stream` and `.chat`; with `speech` off nothing of
    the voice is loaded.
    """

    model: str
    content: tuple[Part, ...]
    options: Options
    speech: bool
    seed: int
    device: str
    dtype: str
    max_memory: int | None
    allow: tuple[str, ...]
    offline: bool

    @property
    def conversation(self) -> list[Message]:
        """The first turn, in the format of the model cards."""
        return [{"role": "user", "content": list(self.content)}]

    @property
    def note(self) -> str | None:
        """What must be said about this model's replies."""
        return NOISE if self.model == POCKET else None

    def settings(self) -> tuple[GenerationSettings, MediaSettings]:
        """The options as the engine sees them.

        Raises:
            UsageError: a value out of range.
        """
        return split_options(self.options, seed=self.seed, speech=self.speech)

    def find_checkpoint(self) -> Checkpoint:
        """The model's folder and headers; nothing is loaded."""
        from lowvram.checkpoint import resolve

        return resolve(self.model, offline=self.offline)

    def open_model(self) -> LowVRAMOmni:
        """The engine. It loads a module when a phase needs it."""
        from lowvram.omni import LowVRAMOmni

        return LowVRAMOmni.from_pretrained(
            self.model,
            max_memory=self.max_memory,
            device=self.device,
            dtype=self.dtype,
            speech=self.speech,
            seed=self.seed,
            allow=self.allow,
            offline=self.offline,
        )

    def asking(self, default: str | None) -> Request:
        """The same request with a question: its own, or else the default one.

        Raises:
            UsageError: there is neither.
        """
        if self.content:
            return self
        if default is None:
            raise UsageError("nothing to answer; give -p TEXT, --image, --audio or --video")
        return replace(self, content=(text_part(default),))

    def suited_to(self, checkpoint: Checkpoint) -> Request:
        """The same request with speech only where the checkpoint can speak.

        Raises:
            UsageError: a voice that the checkpoint does not have.
            CheckpointError: its files do not hold what its config says.
        """
        speech = self.speech and checkpoint.config.speaks
        checkpoint.verify(speech)
        if speech:
            checkpoint.check_speaker(self.options["speaker"])
        return replace(self, speech=speech)

    def speaking(self, can: bool) -> Request:
        """The same request with speech only where the model can speak."""
        return replace(self, speech=self.speech and can)


def read_request(args: Namespace) -> Request:
    """What the flags ask for; `content` is empty where they ask nothing.

    Raises:
        UsageError: a setting out of range, or an unknown option.
        LowVRAMError: standard input that is not text.
    """
    check_options(args.allow)
    say = _to_say(args)
    request = Request(
        model=args.model,
        content=tuple(_content(args, say)),
        options={
            "speaker": args.speaker,
            "max_new_tokens": args.max_tokens,
            "max_speech_seconds": args.max_speech,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "solver": args.solver,
            "whole_speech": args.whole_speech,
            "pieces": args.pieces,
            "look_ahead": args.look_ahead,
            "say": say,
            "system": None if args.system is None else _text("--system", args.system),
            "fps": args.fps,
            "max_frames": args.max_frames,
            "min_pixels": args.min_pixels,
            "max_pixels": args.max_pixels,
            "use_audio_in_video": not args.no_audio_in_video,
        },
        speech=not args.no_speech,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        max_memory=args.max_memory,
        allow=args.allow,
        offline=args.offline,
    )
    request.settings()
    return request


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def media_part(kind: str, place: str) -> Part:
    return {"type": kind, kind: place}


def places(content: Iterable[Part]) -> list[str]:
    """Where the media among the parts are."""
    return [part[part["type"]] for part in content if part["type"] in MEDIA]


def _to_say(args: Namespace) -> str | None:
    """The text of --speech-only, of the verbs that have it."""
    given: str | None = vars(args).get("speech_only")
    if given is None:
        return None
    if args.no_speech:
        raise UsageError("--speech-only and --no-speech exclude each other")
    if given == args.prompt == "-":
        raise UsageError("-p - and --speech-only - both want standard input; give one as text")
    text = _standard_input() if given == "-" else _text("--speech-only", given).strip()
    if not text:
        raise UsageError("--speech-only is empty; give the text that is to be spoken")
    return text


def _content(args: Namespace, say: str | None) -> list[Part]:
    """Media in the order of their kinds, then the text, as in the model cards' examples."""
    parts = [media_part(kind, place) for kind in MEDIA for place in getattr(args, kind)]
    if args.prompt is None:
        return parts if say is None or parts else [text_part(repeating(say)[0]["content"])]
    text = _standard_input() if args.prompt == "-" else _text("-p", args.prompt)
    return [*parts, text_part(text)] if text.strip() else parts


def _standard_input() -> str:
    try:
        return _text("standard input", sys.stdin.read().strip())
    except UnicodeDecodeError as error:
        raise LowVRAMError(f"standard input is not UTF-8 text ({error.reason})") from error


def _text(flag: str, value: str) -> str:
    """Refuses the bytes that a shell may pass and that are no text."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag} is not UTF-8 text: character {error.start} is none") from error
    return value
