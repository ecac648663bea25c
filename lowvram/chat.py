"""A conversation that keeps its turns."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from lowvram.events import AudioChunk, Finished, Result, TextDelta
from lowvram.options import Options

if TYPE_CHECKING:
    from lowvram.omni import LowVRAMOmni


class Chat:
    """Made by `LowVRAMOmni.chat`. `messages` is the conversation so far; it may be edited."""

    def __init__(self, omni: LowVRAMOmni, options: Options) -> None:
        self._omni = omni
        self._options = options
        self.messages: list[Mapping[str, Any]] = []

    def send(
        self, content: str | Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Result:
        """Say something (text, or a content list with media) and get the whole reply."""
        for event in self.stream(content, **options):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("a stream that is not closed ends with Finished")

    def stream(
        self, content: str | Sequence[Mapping[str, Any]], **options: Unpack[Options]
    ) -> Generator[TextDelta | AudioChunk | Finished, None, None]:
        """The reply as it comes. A reply that is cut short leaves the conversation as it was."""
        turn = {"role": "user", "content": content}
        merged: Options = {**self._options, **options}
        for event in self._omni.stream([*self.messages, turn], **merged):
            if isinstance(event, Finished):
                reply = {"role": "assistant", "content": event.result.text}
                self.messages += [turn, reply]
            yield event
