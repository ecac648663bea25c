"""A conversation in the model card's format, checked and brought into one form."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeGuard

from lowvram.conversation.settings import ITEM_SETTINGS, MediaSettings
from lowvram.errors import UsageError

Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
ROLES = ("system", "user", "assistant")

SPEECH_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
    "perceiving auditory and visual inputs, as well as generating text and speech."
)
"""The system prompt that speech needs, because the Talker was trained with it (model card)."""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True, eq=False)
class Media:
    """One medium as it was given; `settings` are the request's, with the item's own on top."""

    kind: Kind
    value: Any
    settings: MediaSettings


@dataclass(frozen=True, eq=False)
class Message:
    role: str
    parts: tuple[Text | Media, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


def parse_messages(messages: object, settings: MediaSettings) -> tuple[Message, ...]:
    """Check a conversation and bring it into one form.

    `messages` is a list of `{"role": ..., "content": ...}` with role system, user or assistant, and
    content a string or a list of `{"type": "text", "text": ...}` and `{"type": "image" | "audio" |
    "video", <the same word>: <path, URL, bytes, array, ...>}`. A media item may carry `fps`,
    `max_frames`, `min_pixels` or `max_pixels` for itself.

    Raises:
        UsageError: anything that is not of this form, naming the message.
    """
    if not _is_list(messages):
        raise UsageError(
            f"the conversation is {_described(messages)}; wanted a list of messages like "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise UsageError("the conversation is empty; wanted at least one message")
    return tuple(_message(raw, f"message {i + 1}", settings) for i, raw in enumerate(messages))


def with_speech_prompt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation, led by the system prompt that speech needs.

    It is added where no system message leads. One that says something else is kept, with one
    warning for each such prompt in the life of the process.
    """
    first = messages[0]
    if first.role != "system":
        return (Message("system", (Text(SPEECH_PROMPT),)), *messages)
    if first.text.strip() != SPEECH_PROMPT:
        _warn_of_other_prompt(first.text)
    return messages


@cache
def _warn_of_other_prompt(text: str) -> None:
    shown = text if len(text) <= 40 else text[:37] + "..."
    warnings.warn(
        f"the system prompt {shown!r} is not the one that speech was trained with, so the voice "
        "may derail; leave the system message out, or switch speech off",
        stacklevel=4,
    )


def media_of(messages: tuple[Message, ...]) -> Iterator[Media]:
    """Every medium of the conversation, in the order in which the prompt shows them."""
    for message in messages:
        yield from (part for part in message.parts if isinstance(part, Media))


def _message(raw: object, where: str, settings: MediaSettings) -> Message:
    if not isinstance(raw, Mapping):
        hint = "; wanted one conversation, not a batch" if _is_list(raw) else ""
        raise UsageError(f"{where} is {_described(raw)}; wanted a dict with role and content{hint}")
    role = raw.get("role")
    if role not in ROLES:
        raise UsageError(f"{where} has role {role!r}; wanted {', '.join(ROLES)}")
    content = raw.get("content")
    if isinstance(content, str):
        return Message(role, (_text(content, where),))
    if not _is_list(content):
        raise UsageError(
            f"{where} has {_described(content)} as content; wanted a string, or a list of items "
            'like {"type": "text", "text": "Hello"}'
        )
    parts = (_part(item, f"{where}, item {i + 1},", settings) for i, item in enumerate(content))
    return Message(role, tuple(parts))


def _part(raw: object, where: str, settings: MediaSettings) -> Text | Media:
    if isinstance(raw, str):
        return _text(raw, where)
    if not isinstance(raw, Mapping):
        raise UsageError(f'{where} is {_described(raw)}; wanted a dict with "type"')
    kind = raw.get("type", next((name for name in ("text", *KINDS) if name in raw), None))
    if kind == "text":
        text = raw.get("text")
        if not isinstance(text, str):
            raise UsageError(f'{where} has {_described(text)} as "text"; wanted a string')
        return _text(text, where)
    if kind not in KINDS:
        raise UsageError(f"{where} has type {kind!r}; wanted text, image, audio or video")
    return Media(kind, _value(raw, kind, where), _item_settings(raw, kind, where, settings))


def _text(text: str, where: str) -> Text:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} has text that is no Unicode ({error.reason}); wanted text in UTF-8"
        ) from error
    return Text(text)


def _value(raw: Mapping[str, Any], kind: Kind, where: str) -> Any:
    """The medium itself, under the model card's key or one of its other published spellings."""
    for key in (kind, f"{kind}_url", "url", "path"):
        if raw.get(key) is not None:
            return raw[key]
    raise UsageError(f'{where} has no "{kind}"; wanted a path, a URL, bytes or an array there')


def _item_settings(
    raw: Mapping[str, Any], kind: Kind, where: str, settings: MediaSettings
) -> MediaSettings:
    known = {"type", kind, f"{kind}_url", "url", "path", *ITEM_SETTINGS}
    unknown = [key for key in raw if key not in known]
    if unknown:
        raise UsageError(
            f"{where} has {unknown[0]!r}, which is not known; besides the {kind} itself an item "
            f"may have {', '.join(ITEM_SETTINGS)}"
        )
    own = {key: raw[key] for key in ITEM_SETTINGS if raw.get(key) is not None}
    return settings.override(own) if own else settings


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _described(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
