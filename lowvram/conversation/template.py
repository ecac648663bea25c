"""The checkpoint's chat template, rendered in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from lowvram.conversation.messages import Message, Text
from lowvram.errors import CheckpointError, LowVRAMError, UsageError

_MARK = re.compile("\ue000(\\d+)\ue001")
"""Stands for a text while the template runs: a number between two private-use characters."""


class ChatTemplate:
    """A jinja2 template, compiled at first use."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._source = source
        self._tokens = dict(tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """From the first of chat_template.jinja, chat_template.json and tokenizer_config.json.

        Raises:
            CheckpointError: none of them has one, or a file is damaged.
        """
        config = _read_json(folder / "tokenizer_config.json")
        tokens = {
            key: _token_text(value) for key, value in config.items() if key.endswith("_token")
        }
        single = folder / "chat_template.jinja"
        source: Any = None
        if single.exists():
            source = single.read_text(encoding="utf-8")
        if source is None:
            source = _read_json(folder / "chat_template.json").get("chat_template")
        if source is None:
            source = config.get("chat_template")
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        if not isinstance(source, str):
            raise CheckpointError(
                f"{folder} has no chat template; wanted chat_template.jinja, chat_template.json or "
                "one in tokenizer_config.json: take the files from the published checkpoint"
            )
        return cls(source, {key: text for key, text in tokens.items() if text is not None})

    def render(self, messages: tuple[Message, ...], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one string, texts included."""
        texts = _texts(messages)
        return self._render(messages, texts, add_generation_prompt)

    def render_marked(self, messages: tuple[Message, ...]) -> str:
        """The conversation up to the reply, with a mark in the place of each text.

        The template never sees what was typed, so nothing typed can pass for a special token that
        the template writes. `fill` puts the texts back.
        """
        marks = [f"\ue000{i}\ue001" for i in range(len(_texts(messages)))]
        return self._render(messages, marks, True)

    @staticmethod
    def fill(marked: str, messages: tuple[Message, ...]) -> str:
        """Part of a marked rendering, with the texts in the place of their marks."""
        texts = _texts(messages)
        return _MARK.sub(lambda found: texts[int(found[1])], marked)

    def _render(
        self, messages: tuple[Message, ...], texts: list[str], add_generation_prompt: bool
    ) -> str:
        left = iter(texts)
        plain = [{"role": m.role, "content": _content(m, left)} for m in messages]
        try:
            return str(
                self._compiled.render(
                    messages=plain, add_generation_prompt=add_generation_prompt, **self._tokens
                )
            )
        except LowVRAMError:
            raise
        except Exception as error:  # a template can raise anything
            raise _template_error("fails", error) from error

    @cached_property
    def _compiled(self) -> Any:
        """Compiled with the environment, filters and globals that transformers gives."""
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self._source)
        except TemplateError as error:
            raise _template_error("cannot be read", error) from error


def _texts(messages: tuple[Message, ...]) -> list[str]:
    return [part.text for m in messages for part in m.parts if isinstance(part, Text)]


def _content(message: Message, texts: Iterator[str]) -> str | list[dict[str, str]]:
    if len(message.parts) == 1 and isinstance(message.parts[0], Text):
        return next(texts)
    return [
        {"type": "text", "text": next(texts)}
        if isinstance(part, Text)
        else {"type": part.kind, part.kind: ""}
        for part in message.parts
    ]


def _refuse(message: object) -> NoReturn:
    reason = str(message).partition("\n")[0]
    raise UsageError(f"the checkpoint's chat template refuses the conversation: {reason}")


def _template_error(what: str, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return CheckpointError(f"the chat template {what} ({reason}); take the published one")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); get the file again") from error
    return found if isinstance(found, dict) else {}


def _token_text(value: Any) -> str | None:
    """A token in `tokenizer_config.json`: a string, or a dict with its content."""
    return value.get("content") if isinstance(value, dict) else value
