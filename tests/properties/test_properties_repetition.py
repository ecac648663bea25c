"""A thousand requests in a row leave memory, tensors, files and threads where they were."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lowvram import LowVRAMOmni
from lowvram.offload.host import resident_bytes
from lowvram.pocket import make_checkpoint, pocket_config

ROUNDS = 1000
SETTLED = 20
"""Requests after which everything that is made once has been made."""

MIB = 1 << 20
GROWTH = 16 * MIB
"""Of the process, by an allocator's moods, in a process that ran many other tests before: 34 KiB a
request that are never given back are more."""

WORDS = [{"role": "user", "content": "Go on."}]


class Books(NamedTuple):
    """What there is between two requests."""

    held: dict[str, int]
    tensors: int
    storage_bytes: int
    files: int
    threads: int


def books(omni: LowVRAMOmni) -> Books:
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return Books(
        omni._meter.held(),
        len(tensors),
        sum(storages.values()),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw: dict[str, Any] = pocket_config()
    raw["thinker_config"]["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
    }
    for tower, width in (("vision_config", "out_hidden_size"), ("audio_config", "output_dim")):
        raw["thinker_config"][tower][width] = 64
    path = tmp_path_factory.mktemp("models") / "small"
    return make_checkpoint(path, speech=False, config=raw)


@pytest.mark.parametrize("roomy", [True, False], ids=["resident", "streamed"])
def test_after_a_thousand_requests_all_is_as_after_a_few(roomy: bool, folder: Path) -> None:
    with LowVRAMOmni.from_pretrained(folder, device="cpu") as first:
        least = first.plan(WORDS, max_new_tokens=2).minimum_budget_bytes
    budget = 8 * least if roomy else least
    with LowVRAMOmni.from_pretrained(folder, device="cpu", max_memory=budget) as omni:
        assert bool(omni.plan(WORDS, max_new_tokens=2).placements) == (not roomy)
        for _ in range(SETTLED):
            reply = omni.generate(WORDS, max_new_tokens=2)
        before, size = books(omni), resident_bytes()
        for _ in range(ROUNDS // 2 - SETTLED):
            again = omni.generate(WORDS, max_new_tokens=2)
            assert again.tokens == reply.tokens
        del again
        assert books(omni) == before
        assert resident_bytes() - size < GROWTH
