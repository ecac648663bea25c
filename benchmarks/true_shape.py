"""Writes a checkpoint of a known model's true shapes with random weights, to measure memory with.

    python benchmarks/true_shape.py Qwen2.5-Omni-3B-AWQ FOLDER

Its tokenizer is that of the built-in model, so the special token ids in its config are too; all
else is as published. A 3B-AWQ takes 6.5 GB of disk and one minute, a 7B-AWQ three.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

from lowvram.pocket import make_checkpoint, pocket_config
from lowvram.specs import SPECS


def main(name: str, folder: str) -> None:
    spec = SPECS[name]
    config, built_in = copy.deepcopy(dict(spec.raw)), pocket_config()
    for part in ("thinker_config", "talker_config"):
        for key, value in built_in[part].items():
            text_id = key.endswith(("token_id", "token_index")) and "codec" not in key
            if text_id and (key in config[part] or key == "eos_token_id"):
                config[part][key] = value
    packed = spec.config.quant is not None
    make_checkpoint(Path(folder), config=config, awq=packed, shards=4)
    print(f"{folder}: {name}, random weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
