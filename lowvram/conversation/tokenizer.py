"""Text to ids and back, from the checkpoint's own files.

Special tokens are written by the chat template alone: in text, `<|im_end|>` is eight characters
like any others, so that nobody can end a turn, or stand in for an image, by typing it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lowvram.conversation.messages import Message, parse_messages
from lowvram.conversation.settings import MediaSettings
from lowvram.conversation.template import ChatTemplate
from lowvram.errors import CheckpointError


class Tokenizer:
    """The tokenizer and chat template of one checkpoint."""

    def __init__(self, core: Any, template: ChatTemplate) -> None:
        added = core.get_added_tokens_decoder()
        if type(core.decoder).__name__ != "ByteLevel":
            raise CheckpointError(
                "the tokenizer is not byte-level, as those of all Qwen2.5-Omni checkpoints are; "
                "take tokenizer.json from the same checkpoint"
            )
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        self.special: Mapping[str, int] = {t.content: i for i, t in added.items() if t.special}
        """Special token -> id. They come out of the chat template, never out of text."""
        self._core = core
        self._template = template
        self._plain = {i: t.content.encode() for i, t in added.items() if not t.special}
        names = sorted(self.special, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and the chat template of a checkpoint.

        Without `tokenizer.json` it is built by transformers from `vocab.json` and `merges.txt`.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        folder = Path(path)
        return cls(_read_core(folder), ChatTemplate.from_folder(folder))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written out in it stay plain text."""
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return TextStream(self)

    def token_bytes(self, index: int) -> bytes:
        """The bytes one id stands for: none for special tokens and for ids without a token."""
        if index in self._plain:
            return self._plain[index]
        token = self._core.id_to_token(index)
        if token is None or token in self.special:
            return b""
        table = _letter_bytes()
        return b"".join(table.get(letter) or letter.encode() for letter in token)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model reads it, one placeholder for each medium."""
        parsed = parse_messages(messages, MediaSettings())
        return self._template.render(parsed, add_generation_prompt=add_generation_prompt)

    def pieces(self, messages: tuple[Message, ...]) -> Iterator[int | str]:
        """The rendered conversation as special tokens (ids) and the runs of text between them."""
        marked = self._template.render_marked(messages)
        for i, piece in enumerate(self._splitter.split(marked)):
            if i % 2:
                yield self.special[piece]
            elif piece:
                yield self._template.fill(piece, messages)


class TextStream:
    """Ids to text as they come: whole characters only, the same in sum as `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """The characters that this id completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(index))

    def finish(self) -> str:
        """What is left: U+FFFD where the last character never came whole."""
        return self._decoder.decode(b"", final=True)


def _read_core(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.exists():
        return _build_core(folder)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read ({reason}); get the file again from the same checkpoint"
        ) from error


def _build_core(folder: Path) -> Any:
    if not (folder / "vocab.json").exists():
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json; wanted a checkpoint's tokenizer"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({reason})") from error


@cache
def _letter_bytes() -> dict[str, bytes]:
    """The byte behind each letter of a byte-level vocabulary: GPT-2's published table.

    Bytes with a visible Latin-1 letter are that letter; the others follow from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): bytes([byte]) for byte in visible}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(hidden)}
