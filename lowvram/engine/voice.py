"""A voice of a checkpoint: the three things `spk_dict.pt` holds for each speaker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Voice:
    """How one speaker sounds; tensors are fp32 on the CPU.

    `bos_token` is the text token that its speech begins with; `cond` [1, enc_emb_dim] and
    `ref_mel` [1, frames, mel_dim] (a recording of the speaker) condition the DiT.
    """

    name: str
    bos_token: int
    cond: Tensor
    ref_mel: Tensor

    @classmethod
    def from_entry(cls, name: str, entry: Mapping[str, Any]) -> Voice:
        """One entry of the dictionary in `spk_dict.pt`.

        Raises:
            CheckpointError: a key is missing or a tensor has another number of axes.
        """
        missing = [key for key in ("bos_token", "cond", "ref_mel") if key not in entry]
        if missing:
            raise CheckpointError(
                f"voice {name!r} in spk_dict.pt lacks {', '.join(missing)}: "
                "download the checkpoint again"
            )
        return cls(
            name=name,
            bos_token=int(entry["bos_token"]),
            cond=_tensor(name, "cond", entry["cond"], axes=2),
            ref_mel=_tensor(name, "ref_mel", entry["ref_mel"], axes=3),
        )


def _tensor(voice: str, key: str, value: object, axes: int) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != axes or value.shape[0] != 1:
        seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(
            f"{key} of voice {voice!r} in spk_dict.pt is {seen}; wanted a tensor with {axes} axes, "
            "the first of length 1: download the checkpoint again"
        )
    return value.detach().to(device="cpu", dtype=torch.float32)
