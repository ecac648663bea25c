"""mlx-lm's loader, an unpacker of its own: logits on the CPU, in float16."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from findings import GROUPS, expected, found, share, text_folder
from mlx_lm.utils import load_model

LIMIT = 1e-2
"""It keeps the product of zero point and step, rounded to float16, in place of the zero point."""


def main() -> None:
    mx.set_default_device(mx.cpu)
    for group in GROUPS:
        true = expected(group)
        model, _ = load_model(Path(text_folder(group)))
        out = model(mx.array(true["tokens"].numpy())[None]).astype(mx.float32)
        off = share(torch.from_numpy(np.array(out))[0], true["logits"])
        found(f"logits of mlx-lm, float16, g{group}", off, LIMIT)


if __name__ == "__main__":
    main()
