"""Token2wav's speed on the CPU at true shapes: ours, the official constants, and transformers.

    python benchmarks/token2wav.py --seconds 5 --json benchmarks/results/token2wav-5s-DATE.json
    python benchmarks/token2wav.py --seconds 30 --rows default official transformers

Random weights of the published shapes (those of 3B and 7B are the same), fp32, codes one by one.
A row: `default` is what streams; `exact` streams the very frames of the whole utterance; `whole`
makes them at once; `official` has the official constants (48 codes new, 24 and 12 of context) on
our modules; `bf16` is the default with the layers of the DiT in bfloat16; `transformers` is its own
class with its defaults, of whose nine solver steps, all the same work, `--their-steps` are taken
(all of them up to ten seconds of speech, else one) and the DiT's time counted for nine.

Operations are counted apart, at the same shapes. Seconds of the machine while something else runs
say little: the result names its load. Four minutes for 5 s; 30 s as above under eight.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from token2wav_count import Counter
from token2wav_model import random_codes, random_token2wav, random_voice
from token2wav_rows import (
    THEIR_STEPS,
    Theirs,
    TimedToken2Wav,
    Way,
    official,
    streamed,
    timed,
    whole,
)

from lowvram.config import BigVGANConfig, DiTConfig, OmniConfig
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.voice import Voice
from lowvram.models.token2wav import Token2Wav
from lowvram.settings import CODES_PER_SECOND

ROWS = ("default", "exact", "whole", "official", "bf16", "transformers")
STD = 0.02
ASKED = {"official": 1.4, "transformers": 4.0}
"""How many times longer than the default these should take."""
ASKED_WORK, WORK_SECONDS = 1.25, 20
"""Work of the DiT over that of the whole utterance, at most, in speech of so many seconds."""


@dataclass
class Row:
    """What a way took. `cpu_s` are seconds of all threads, which what else runs hardly changes;
    `peak_bytes` is the most it had above what the process had before; `first_sound_s` is the time
    spent until then, in which no code is waited for."""

    name: str
    seconds: float
    cpu_s: float
    dit_s: float
    vocoder_s: float
    real_time_factor: float
    first_sound_s: float
    first_sound_codes: int
    first_sound_samples: int
    samples: int
    peak_bytes: int | None
    dit_operations: int | None = None
    vocoder_operations: int | None = None
    work: float | None = None


def ways(name: str) -> Callable[[Token2Wav, Voice], Way]:
    """How that row makes sound, of ours."""
    if name == "official":
        return official
    if name == "whole":
        return whole
    settings = VocodeSettings(exact=name == "exact")
    return lambda model, voice: streamed(model, voice, settings)


def measured(name: str, way: Way, codes: Sequence[int], model: TimedToken2Wav | None) -> Row:
    """Runs it once."""
    taken, samples, first = 0, 0, (0.0, 0, 0)

    def coming() -> Iterator[int]:
        nonlocal taken
        for code in codes:
            taken += 1
            yield code

    memory = Peak()
    if model is not None:
        model.wave_s = 0.0
    started, worked = time.perf_counter(), time.process_time()
    for chunk in way(coming()):
        assert np.isfinite(chunk).all()
        if not samples:
            first = time.perf_counter() - started, taken, len(chunk)
        samples += len(chunk)
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    vocoder = model.wave_s if model is not None else 0.0
    speech = len(codes) / CODES_PER_SECOND
    return Row(
        name,
        seconds,
        worked,
        seconds - vocoder,
        vocoder,
        seconds / speech,
        *first,
        samples,
        memory.grown(),
    )


class Peak:
    """The most memory the process has from now on, above what it has now; Linux only."""

    def __init__(self) -> None:
        self._before: int | None = None
        with suppress(OSError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._before = self._status("VmRSS")

    def grown(self) -> int | None:
        return None if self._before is None else self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def their_row(config: OmniConfig, model: Token2Wav, voice: Voice, codes: Any, steps: int) -> Row:
    theirs = Theirs(config, model, voice, steps)
    print(f"transformers with {theirs.attention} attention, {steps} of {THEIR_STEPS} steps")
    row = measured("transformers", theirs.run, codes, None)
    row.dit_s, row.vocoder_s = theirs.dit_s, theirs.wave_s
    row.cpu_s *= (theirs.dit_s + theirs.wave_s) / row.seconds
    row.seconds = row.first_sound_s = theirs.dit_s + theirs.wave_s
    row.real_time_factor = row.seconds * CODES_PER_SECOND / len(codes)
    return row


def rows(
    config: OmniConfig, names: Sequence[str], seconds: float, their_steps: int, counter: Counter
) -> Iterator[Row]:
    """Each as it is done."""
    assert config.dit is not None and config.bigvgan is not None
    codes = random_codes(round(seconds * CODES_PER_SECOND), seed=1)
    voice = random_voice(config.dit, seed=2)
    model = random_token2wav(config.dit, config.bigvgan, seed=0, std=STD)
    at_once = counter.operations(len(codes), whole).dit
    # Threads, kernels and code paths are there before anything is measured.
    warm = timed(config, model, torch.float32)
    list(streamed(warm, voice, VocodeSettings(time_points=2))(iter(codes[:50])))
    for name in names:
        if name == "transformers":
            yield their_row(config, model, voice, codes, their_steps)
            continue
        ours = timed(config, model, torch.bfloat16 if name == "bf16" else torch.float32)
        row = measured(name, ways(name)(ours, voice), codes, ours)
        counted = counter.operations(len(codes), ways(name))
        row.dit_operations, row.vocoder_operations = counted
        row.work = counted.dit / at_once
        yield row


def work_of(counter: Counter, names: Sequence[str]) -> dict[str, float]:
    """Of the DiT, in 20 s of speech, over that of the whole utterance."""
    codes = WORK_SECONDS * CODES_PER_SECOND
    at_once = counter.operations(codes, whole).dit
    return {name: counter.operations(codes, ways(name)).dit / at_once for name in names}


def line(row: Row) -> str:
    peak = f"{row.peak_bytes / 2**20:6.0f} MiB" if row.peak_bytes is not None else " " * 10
    work = f"{row.work:5.2f}" if row.work is not None else " " * 5
    return (
        f"{row.name:13}{row.seconds:8.1f} s (DiT {row.dit_s:.1f}, vocoder {row.vocoder_s:.1f}; "
        f"{row.cpu_s:.1f} of cores){row.real_time_factor:7.2f} x real time; work {work}; "
        f"first sound {row.first_sound_codes} codes and {row.first_sound_s:.2f} s; {peak}"
    )


def compared(found: dict[str, Row]) -> list[str]:
    """What was asked for, and what there is."""
    if "default" not in found:
        return []
    lines = []
    for name, times in ASKED.items():
        if name in found:
            reached = found[name].seconds / found["default"].seconds
            cores = found[name].cpu_s / found["default"].cpu_s
            lines.append(
                f"{name} takes {reached:.2f} x the default, and {cores:.2f} x its seconds of cores "
                f"(asked: {times} or more)"
            )
    return lines


def main(arguments: Sequence[str], config: OmniConfig | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of speech; default 5")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--their-steps", type=int, choices=range(1, THEIR_STEPS + 1))
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(arguments)
    config = config or OmniConfig(dit=DiTConfig(), bigvgan=BigVGANConfig())
    steps = options.their_steps or (THEIR_STEPS if options.seconds <= 10 else 1)
    assert config.dit is not None
    counter = Counter(config, random_voice(config.dit, seed=2))
    load, found = os.getloadavg()[0], {}
    for row in rows(config, options.rows, options.seconds, steps, counter):
        found[row.name] = row
        print(line(row), flush=True)
    work = work_of(counter, ("default", "official"))
    told = compared(found)
    told.append(
        f"work of the DiT in {WORK_SECONDS} s of speech: {work['default']:.3f} x the whole "
        f"utterance (asked: {ASKED_WORK} or less), official {work['official']:.3f}"
    )
    print("\n".join(told))
    if options.json:
        result = {
            "command": f"token2wav.py {' '.join(arguments)}",
            "date": f"{date.today()}",
            "threads": torch.get_num_threads(),
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "torch": torch.__version__,
            "their_steps": steps,
            "rows": [asdict(row) for row in found.values()],
            "work_over_20_s": work,
            "told": told,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
