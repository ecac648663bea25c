"""Whether token2wav takes more memory for longer speech: its peak at true shapes, by the meter.

    python benchmarks/token2wav_memory.py --seconds 10 600 --json benchmarks/results/NAME-DATE.json

On `meta`, where tensors have shapes and no memory: everything that is made or kept beside weights,
at the default settings and in the exact mode. Nothing is timed; ten minutes of speech take about
as long as they would to listen to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from token2wav_model import random_voice

from lowvram.config import BigVGANConfig, DiTConfig, OmniConfig
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.vocode import NoiseSource, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.models.token2wav import Token2Wav
from lowvram.offload import Meter, open_device
from lowvram.settings import CODES_PER_SECOND

MODES = {"default": VocodeSettings(), "exact": VocodeSettings(exact=True)}
ASKED = 1.01
"""How much more than the shortest the longest speech may take, at most."""


def peak(config: OmniConfig, voice: Voice, settings: VocodeSettings, seconds: float) -> int:
    """Bytes of activations and of what is kept, code by code as the engine vocodes, from when the
    voice is prepared: that takes the same whatever is said."""
    with torch.device("meta"):
        model = Token2Wav(config).requires_grad_(False).eval()
    meter = Meter(open_device("meta"))
    stream = SpeechStream(model, voice, NoiseSource(0), settings)
    with torch.inference_mode():
        stream.prepare()
    with meter.phase("vocode"), torch.inference_mode():
        for _ in range(round(seconds * CODES_PER_SECOND)):
            for _ in stream.push([0]):
                pass
        for _ in stream.finish():
            pass
    return meter.phases[0].peak_bytes


def main(arguments: Sequence[str], config: OmniConfig | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 600], help="of speech")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES))
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(arguments)
    config = config or OmniConfig(dit=DiTConfig(), bigvgan=BigVGANConfig())
    assert config.dit is not None
    voice, found = random_voice(config.dit, seed=2), {}
    for mode in options.modes:
        peaks = {f"{s:g}": peak(config, voice, MODES[mode], s) for s in options.seconds}
        grown = max(peaks.values()) / min(peaks.values())
        found[mode] = {"peak_bytes": peaks, "grown": grown}
        told = ", ".join(f"{count / 2**20:.1f} MiB for {s} s" for s, count in peaks.items())
        print(f"{mode}: {told}; {grown:.4f} x (asked: {ASKED} or less)", flush=True)
    if options.json:
        command = f"token2wav_memory.py {' '.join(arguments)}"
        result = {"command": command, "date": f"{date.today()}", "modes": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
