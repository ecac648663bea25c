"""The same text model as llama.cpp runs it, where `llama-cpp-python` is installed."""

from __future__ import annotations

import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lowvram.bench.llama_file import EMBEDDING, tensors, write_gguf
from lowvram.config import DecoderConfig
from lowvram.errors import DeviceError

HEAD = "8-bit"


class LlamaThinker:
    """Random weights in a temporary file, Q4_0 with a Q8_0 head, opened by llama.cpp.

    The file is gone once it is read: `with LlamaThinker(...) as theirs` closes the library's model.

    Raises:
        DeviceError: the library is not installed or does not load, there is no room for
            the file, or the library refuses it.
    """

    def __init__(self, text: DecoderConfig, context: int, prompt: int) -> None:
        self._text, self._context = text, context
        self._prompt = [token % text.vocab_size for token in range(prompt)]

    def __enter__(self) -> LlamaThinker:
        try:
            self._library = import_module("llama_cpp")
        except (ImportError, OSError, RuntimeError) as error:
            # Not installed; or its shared library is missing or made for another machine.
            raise DeviceError(
                f"llama_cpp cannot be imported ({error}); wanted llama-cpp-python 0.3 or newer"
            ) from error
        needed = sum(tensor.nbytes for tensor in tensors(self._text))
        with tempfile.TemporaryDirectory(prefix="lowvram-bench-") as folder:
            self._model = self._opened(Path(folder), needed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._model.close()

    def step(self) -> None:
        """One token more, after `context` others; every call takes the same place."""
        if self._model.n_tokens < self._context:
            self._run(0, self._prompt[: self._context])
        self._run(self._context, self._prompt[:1])

    def prefill(self, tokens: int) -> None:
        """The prompt's first `tokens`, and the logits of the last."""
        self._run(0, self._prompt[:tokens])

    def bytes_per_token(self) -> int:
        """Bytes that decoding one token reads: layers, head, and float16 keys and values."""
        text = self._text
        kept = sum(tensor.nbytes for tensor in tensors(text) if tensor.name != EMBEDDING)
        place = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
        return kept + 2 * place * self._context

    def _run(self, start: int, tokens: list[int]) -> None:
        self._model.n_tokens = start
        self._model.eval(tokens)
        # Waits until they are there.
        self._library.llama_get_logits(self._model.ctx)

    def _opened(self, folder: Path, needed: int) -> Any:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DeviceError(
                f"its file of {needed / 1e9:.1f} GB does not fit {folder.parent} "
                f"({free / 1e9:.1f} GB free); set TMPDIR to a folder with room"
            )
        path = folder / "random.gguf"
        threads = torch.get_num_threads()
        try:
            write_gguf(path, self._text)
            return self._library.Llama(
                model_path=str(path),
                n_ctx=max(len(self._prompt), self._context + 1),
                n_batch=len(self._prompt),
                n_threads=threads,
                n_threads_batch=threads,
                use_mmap=False,
                verbose=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DeviceError(
                f"llama.cpp does not open its file ({error}); wanted llama-cpp-python 0.3 or newer"
            ) from error
