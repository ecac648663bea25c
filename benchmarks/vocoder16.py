"""How far 16-bit layers of the DiT take the speech from that of fp32.

    python benchmarks/vocoder16.py --json benchmarks/results/vocoder16-DATE.json

Whole utterances of 80 codes, Euler, on the CPU: the built-in model, and random networks of the
published depth and attention layers, narrow, with weights of deviation 0.05 to 0.15 (see
`look_ahead.py`). Deviations of the mel frames and of the waveform, which BigVGAN makes in fp32 of
both, are an rms over the standard deviation. Three minutes.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from functools import partial
from pathlib import Path

import torch
from look_ahead import SMALLEST_VOCODER, STDS, narrow
from token2wav_model import random_codes, random_token2wav, random_voice

from lowvram.checkpoint import resolve
from lowvram.config import OmniConfig
from lowvram.engine.voice import Voice
from lowvram.models.token2wav import Token2Wav
from lowvram.offload import Loader, Meter, Part, open_device

CODES = 80
SEEDS = (1, 2, 3)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def deviation(wanted: torch.Tensor, seen: torch.Tensor) -> float:
    return float((seen - wanted).square().mean().sqrt() / wanted.std())


def deviations(full: Token2Wav, half: Token2Wav, voice: Voice) -> dict[str, float]:
    noise = torch.randn(CODES * full.repeats, 80, generator=torch.Generator().manual_seed(5))
    codes = random_codes(CODES, 6)
    wanted, seen = (one.mel(one.prepare(voice), codes, noise) for one in (full, half))
    waves = deviation(full.wave(wanted), full.wave(seen))
    return {"mel": deviation(wanted, seen), "wave": waves}


def of_random(std: float, seed: int, dtype: torch.dtype) -> dict[str, float]:
    dit = narrow(128)
    full = random_token2wav(dit, SMALLEST_VOCODER, seed, std)
    half = Token2Wav(OmniConfig(dit=dit, bigvgan=SMALLEST_VOCODER), dtype)
    half.load_state_dict(full.state_dict())
    return deviations(full, half, random_voice(dit, seed))


def of_pocket(dtype: torch.dtype) -> dict[str, float]:
    checkpoint, device = resolve("pocket"), open_device("cpu")
    kinds = {"full": torch.float32, "half": dtype}
    parts = [
        Part(name, "token2wav.", partial(Token2Wav, checkpoint.config, kind), torch.float32)
        for name, kind in kinds.items()
    ]
    loader = Loader(checkpoint.store, device, Meter(device), parts)
    full, half = (loader.load(name) for name in kinds)
    assert isinstance(full, Token2Wav) and isinstance(half, Token2Wav)
    found = deviations(full, half, next(iter(checkpoint.load_voices().values())))
    loader.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            rows.append({"dtype": name, "network": "pocket", **of_pocket(dtype)})
            for std in STDS:
                for seed in SEEDS:
                    found = of_random(std, seed, dtype)
                    rows.append({"dtype": name, "network": f"std {std}, seed {seed}", **found})
    for row in rows:
        print(f"{row['dtype']:9} {row['network']:16} {row['mel']:.1e} {row['wave']:.1e}")
    if asked.json:
        report = {"date": str(date.today()), "codes": CODES, "rows": rows}
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
