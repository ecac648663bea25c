"""The prompt's embeddings: token rows read from the file, media through their towers.

Everything stays on the host; the towers see one frame pair, or one window of 2 s, at a time, which
is exact because neither attends further.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lowvram.config import AudioConfig
from lowvram.conversation import Prompt
from lowvram.engine.context import Context
from lowvram.models.audio import AudioTower
from lowvram.models.vision import VisionTower

EMBEDDING = "thinker.model.embed_tokens.weight"


def embed_tokens(context: Context, ids: Sequence[int]) -> torch.Tensor:
    """Rows of the Thinker's input embedding, [n, H] on the host.

    Only these rows are read: the table (1.09 GB in the 7B) is never in memory.
    """
    return context.store.rows(EMBEDDING, list(ids)).to(context.host, context.dtype)


def embed_prompt(context: Context, prompt: Prompt) -> torch.Tensor:
    """The prompt's embeddings [T, H] on the host, zero where media go (see `media_slots`)."""
    unique, back = np.unique(prompt.ids, return_inverse=True)
    rows = embed_tokens(context, unique.tolist())
    embeds = rows[torch.from_numpy(back).to(context.host)]
    return embeds.index_fill_(0, media_slots(prompt).to(context.host), 0)


def media_slots(prompt: Prompt) -> torch.Tensor:
    """Indices of the prompt's tokens that stand for images, video and sound, int64 [n]."""
    seen, heard = [i.slots for i in prompt.vision], [i.slots for i in prompt.audio]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *seen, *heard]))


def encode_vision(context: Context, prompt: Prompt, embeds: torch.Tensor) -> None:
    """Write the embeddings of images and video into their slots of `embeds`."""
    with context.phase("vision"), context.use("visual", VisionTower) as tower:
        for item in prompt.vision:
            pairs, height, width = item.grid
            slots = torch.from_numpy(item.slots).view(pairs, -1).to(context.host)
            for pair in range(pairs):
                patches = context.to_device(torch.from_numpy(item.patches(pair)))
                embeds.index_copy_(0, slots[pair], context.to_host(tower(patches, height, width)))
                del patches  # before the next ones come


def encode_audio(
    context: Context, prompt: Prompt, embeds: torch.Tensor, config: AudioConfig
) -> None:
    """Write the embeddings of recordings and sound tracks into their slots of `embeds`."""
    window = 2 * config.n_window
    with context.phase("audio"), context.use("audio", AudioTower) as tower:
        for item in prompt.audio:
            slots = torch.from_numpy(item.slots).to(context.host)
            done = 0
            for start in range(0, item.features.shape[1], window):
                mel = torch.from_numpy(item.features[:, start : start + window].copy())
                out = context.to_host(tower(context.to_device(mel)))
                embeds.index_copy_(0, slots[done : done + len(out)], out)
                done += len(out)
