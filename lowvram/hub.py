"""Checkpoints from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowvram.errors import CheckpointError

FILES = (
    "config.json",
    "quant_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "spk_dict.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a checkpoint is read from; nothing else is downloaded."""

_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/model."""
    return _ID.fullmatch(name) is not None and not name.startswith(".")


CONFIG_FILES = ("config.json", "quant_config.json")
"""What a plan can be made from."""


def download(hub_id: str, *, offline: bool, files: Sequence[str] = FILES) -> Path:
    """The folder of a hub checkpoint in the client's cache, its `files` downloaded unless
    `offline`.

    Raises:
        CheckpointError: it is unknown, not open to everyone, not in the cache, or out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with _bars_only_on_a_terminal():
            path = snapshot_download(hub_id, allow_patterns=list(files), local_files_only=offline)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} is not open to everyone: accept its terms on huggingface.co, log in with "
            "`hf auth login`, or give a folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {hub_id}, or not for you: check its spelling, log in with "
            "`hf auth login`, or give a folder"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "the hub cannot be reached: try again"
        if offline:
            why = "--offline is set: leave it out"
        raise CheckpointError(
            f"{hub_id} is not in the cache, and {why}, or give the folder of a checkpoint"
        ) from error
    except Exception as error:  # The client lets its network library's errors through.
        raise CheckpointError(
            f"{hub_id} cannot be downloaded ({_first_line(error)}); try again, or give the folder "
            "of a checkpoint"
        ) from error
    return Path(path)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
