"""Conversations to calibrate with: from a folder of media, a file of conversations, or made here.

What cannot be read is found out later, one conversation at a time, by whoever prepares it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowvram.errors import MediaError, UsageError
from lowvram.quantize.builtin import Conversation, builtin_conversation
from lowvram.quantize.settings import BUILTIN, NONE, QuantizeSettings

_SUFFIXES = {
    "image": ".bmp .gif .jpeg .jpg .png .tif .tiff .webp",
    "audio": ".aif .aiff .flac .m4a .mp3 .oga .ogg .opus .wav",
    "video": ".avi .m4v .mkv .mov .mp4 .webm",
    "text": ".md .txt",
}
_KIND = {suffix: kind for kind, group in _SUFFIXES.items() for suffix in group.split()}
_QUESTIONS = {
    "image": ("What is in this picture?", "请描述这张图片。", "Read out any text in the picture."),
    "audio": ("Write down what is said.", "这段音频里有什么？", "Which sounds are to be heard?"),
    "video": ("What happens in this video?", "请概括这段视频。", "Who does what here, and why?"),
}
_DIGESTED = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """One conversation that may be used, and how to name it in a message."""

    label: str
    kind: str
    place: Any

    def conversation(self) -> Conversation:
        """In the message format of `lowvram`.

        Raises:
            MediaError: a text file that cannot be read, or a line that is no conversation.
        """
        if self.kind == BUILTIN:
            return builtin_conversation(*self.place)
        if self.kind == "line":
            return _parse_line(self.label, *self.place)
        if self.kind == "text":
            return [{"role": "user", "content": _read_text(self.place)}]
        number, path = self.place
        questions = _QUESTIONS[self.kind]
        question = {"type": "text", "text": questions[number % len(questions)]}
        content = [{"type": self.kind, self.kind: str(path)}, question]
        return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class CalibrationSet:
    """Candidates in the order in which they are tried; `digest` tells one set from another."""

    name: str
    candidates: tuple[Candidate, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.candidates)


def find_calibration(settings: QuantizeSettings) -> CalibrationSet:
    """The calibration set that `settings` names; empty for `none`. Opens no medium.

    Raises:
        UsageError: no such folder or file, or nothing in it that could be used.
    """
    where = settings.calibration
    if where == NONE:
        return CalibrationSet(NONE, (), NONE)
    if where == BUILTIN:
        return builtin_set(settings.samples, settings.seed, first=0)
    path = Path(where).expanduser()
    if path.is_dir():
        found = list(_files_in(path))
    elif path.is_file() and path.suffix == ".jsonl":
        found = list(_lines_of(path))
    else:
        what = "is no .jsonl file" if path.is_file() else "is neither a folder nor a file"
        raise UsageError(
            f"--calibration {where} {what}; wanted a folder of media and texts, a .jsonl file of "
            f"conversations, {BUILTIN} or {NONE}"
        )
    if not found:
        known = "pictures, sounds, videos or texts" if path.is_dir() else "conversations"
        raise UsageError(f"--calibration {where} holds no {known}; wanted at least one")
    order = np.random.default_rng(settings.seed).permutation(len(found))
    return CalibrationSet(path.name, tuple(found[i] for i in order), _digest(path, found))


def builtin_set(count: int, seed: int, *, first: int) -> CalibrationSet:
    """Conversations `first` to `first + count` of the set that is made here."""
    numbers = range(first, first + count)
    candidates = (Candidate(f"built-in item {i}", BUILTIN, (i, seed)) for i in numbers)
    return CalibrationSet(BUILTIN, tuple(candidates), f"{BUILTIN} 1 {first} {count}")


def _files_in(folder: Path) -> Iterator[Candidate]:
    for number, path in enumerate(sorted(folder.rglob("*"))):
        kind = _KIND.get(path.suffix.lower())
        if kind == "text" and path.is_file():
            yield Candidate(str(path), kind, path)
        elif kind is not None and path.is_file():
            yield Candidate(str(path), kind, (number, path))


def _lines_of(path: Path) -> Iterator[Candidate]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--calibration {path} cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Candidate(f"{path}, line {number},", "line", (line, path.parent))


def _parse_line(label: str, line: str, folder: Path) -> Conversation:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise MediaError(f"{label} is no JSON ({error})") from error
    if isinstance(value, dict):
        value = value.get("messages", value.get("conversation"))
    if not isinstance(value, list):
        raise MediaError(f'{label} holds no conversation; wanted a list, or {{"messages": [...]}}')
    return [_placed(message, folder) for message in value]


def _placed(message: Any, folder: Path) -> Any:
    """The message with relative paths of media read from the folder of the file."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_placed_item(item, folder) for item in message["content"]]}


def _placed_item(item: Any, folder: Path) -> Any:
    if not isinstance(item, dict):
        return item
    keys = [key for key in ("image", "audio", "video", "path") if isinstance(item.get(key), str)]
    local = {key: str(folder / item[key]) for key in keys if ":" not in item[key][:8]}
    return {**item, **local}


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if not text:
        raise MediaError(f"{path} is empty; wanted text")
    return text


def _digest(path: Path, found: list[Candidate]) -> str:
    digest = hashlib.sha256()
    for candidate in found:
        if candidate.kind == "line":
            digest.update(candidate.place[0].encode())
            continue
        file = candidate.place if candidate.kind == "text" else candidate.place[1]
        digest.update(str(file.relative_to(path)).encode())
        with suppress(OSError), file.open("rb") as data:
            digest.update(f" {file.stat().st_size}\n".encode() + data.read(_DIGESTED))
    return digest.hexdigest()
