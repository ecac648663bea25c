"""How far streamed mel frames are from those of the whole utterance, by look-ahead.

    python benchmarks/look_ahead.py --json benchmarks/results/look-ahead-DATE.json

On random networks of the published depth and attention layers, narrow, fp32, on the CPU: weights of
deviation 0.05 to 0.15, where the greater ones make attention strong (beyond, the flow is chaotic).
Deviations are the rms of a frame over the standard deviation of the whole utterance's mel, Euler,
nine evaluations. Beside the default pieces: those of four blocks, as the official ones have, and
the official constants, which compute the two blocks before a piece again. Two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from token2wav_model import (
    official_mel,
    random_codes,
    random_token2wav,
    random_voice,
    streamed_mel,
)
from torch import Tensor

from lowvram.config import BigVGANConfig, DiTConfig
from lowvram.engine.pieces import VocodeSettings

LOOK_AHEAD = (0, 1, 2, 3, 9)
STDS = (0.05, 0.1, 0.15)
OFFICIAL = "official 48/24/12"


def narrow(hidden: int) -> DiTConfig:
    """The published DiT, but for its widths."""
    return DiTConfig(
        hidden_size=hidden,
        num_attention_heads=hidden // 32,
        head_dim=32,
        emb_dim=64,
        enc_dim=16,
        enc_emb_dim=24,
        enc_channels=(16, 16, 16, 16, 48),
        enc_attention_channels=8,
        enc_se_channels=8,
    )


SMALLEST_VOCODER = BigVGANConfig(upsample_initial_channel=64)


def variants() -> dict[str, VocodeSettings]:
    """Name -> how it streams."""
    default = VocodeSettings().blocks
    found = {
        f"{', '.join(map(str, default))}; look-ahead {ahead}": VocodeSettings(look_ahead=ahead)
        for ahead in LOOK_AHEAD
    }
    return found | {"4; look-ahead 1": VocodeSettings(blocks=(4,))}


def mels(std: float, seed: int, codes: int, hidden: int) -> Iterator[tuple[str, Tensor]]:
    """The whole utterance's mel frames, then those of each variant."""
    config = narrow(hidden)
    model = random_token2wav(config, SMALLEST_VOCODER, seed, std)
    utterance = model.prepare(random_voice(config, seed))
    spoken = random_codes(codes, seed)
    noise = torch.randn(2 * codes, 80, generator=torch.Generator().manual_seed(seed))
    yield "whole", model.mel(utterance, spoken, noise)
    for name, settings in variants().items():
        yield name, streamed_mel(model, utterance, spoken, noise, settings)
    yield OFFICIAL, official_mel(model, utterance, spoken, noise)


def deviations(
    std: float, seeds: Sequence[int], codes: int, hidden: int
) -> Iterator[dict[str, Any]]:
    """For each variant what its frames are off, of all networks with these weights together."""
    frames: dict[str, list[Tensor]] = {}
    for seed in seeds:
        (_, whole), *others = mels(std, seed, codes, hidden)
        for name, mel in others:
            off = (mel - whole).square().mean(dim=1).sqrt() / whole.std()
            frames.setdefault(name, []).append(off.double())
    for name, found in frames.items():
        off = torch.cat(found)
        yield {
            "std": std,
            "pieces": name,
            "rms": float(off.square().mean().sqrt()),
            "mean": float(off.mean()),
            "p95": float(off.quantile(0.95)),
            "max": float(off.max()),
            "worst_rms_of_a_network": max(float(one.square().mean().sqrt()) for one in found),
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("rms", "mean", "p95", "max")
    lines = [f"{'weights':8}{'pieces':26}" + "".join(f"{name:>10}" for name in columns)]
    for row in rows:
        cells = "".join(f"{row[name]:10.1e}" for name in columns)
        lines.append(f"{row['std']:<8}{row['pieces']:26}{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", type=int, default=3, help="of each deviation; default 3")
    parser.add_argument("--codes", type=int, default=400, help="of the utterance; default 400")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 32")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for std in STDS:
        rows += deviations(std, range(options.networks), options.codes, options.hidden)
    print(table(rows))
    if options.json:
        told = {
            "command": f"look_ahead.py {' '.join(arguments)}",
            "date": f"{date.today()}",
            "networks": options.networks,
            "codes": options.codes,
            "hidden": options.hidden,
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
