"""Codes a second of the Talker's loop at true shapes with random weights, beside its bare passes.

    python benchmarks/talker_loop.py --device cpu --model Qwen2.5-Omni-3B --json out.json

Every step of the loop is followed by a bare pass of the same decoder (no codes, no drawing), so
that both meet the same load; what is told is the median of each and of their ratio. On cuda steps
are recorded and replayed unless `--launched` is given. The 7B's Talker takes 2.7 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lowvram.checkpoint import GenerationDefaults
from lowvram.config import DecoderConfig
from lowvram.engine import graph
from lowvram.engine.passes import DecoderPasses
from lowvram.engine.spans import in_place
from lowvram.engine.talk import TalkLoop, codec_sampler
from lowvram.models import KVCache, Talker
from lowvram.offload import Meter, open_device
from lowvram.quant import Scratch
from lowvram.settings import TALKER_SAMPLING, SamplingSettings
from lowvram.specs import SPECS

PROMPT = 64
REPLY = 20  # states of the reply, before its end and the padding


class Bench:
    """What a loop asks of a request's context, without a request."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = open_device(device), dtype
        self.host, self.scratch = torch.device("cpu"), Scratch()
        self.meter = Meter(self.device)
        self.store = SimpleNamespace(rows=lambda name, ids: torch.zeros(len(ids), self.width))
        self.plan = SimpleNamespace(recorded={"talker": 1 << 30})
        self.recorded: dict[str, Any] = {}
        self.notes: list[str] = []
        self.width = 0

    @contextmanager
    def phase(self, name: str, *, stepwise: bool = False) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def stream(self, part: str) -> Any:
        return SimpleNamespace(streams=False, restart=lambda: None, unit=nullcontext)

    def load(self, part: str) -> None:
        """It is there."""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device.torch, self.dtype)


def make_talker(name: str, bench: Bench) -> Talker:
    config = SPECS[name].config.talker
    assert config is not None
    with torch.device("meta"):
        talker = Talker(config).to(bench.dtype).requires_grad_(False)
    talker.to_empty(device=bench.device.torch)
    for parameter in talker.parameters():
        parameter.uniform_(-0.03, 0.03)
    for module in talker.modules():
        if callable(hook := getattr(module, "after_load", None)):
            hook()
    bench.width = config.embedding_size
    return talker


def make_cache(config: DecoderConfig, tokens: int, bench: Bench) -> KVCache:
    heads, width = config.num_key_value_heads, config.head_dim
    layers, device = config.num_hidden_layers, bench.device.torch
    return KVCache(layers, 1, heads, tokens, width, bench.dtype, device)


def measure(name: str, bench: Bench, codes: int, sampling: SamplingSettings) -> dict[str, Any]:
    """Seconds of each step of the loop, and of a bare pass after it."""
    talker = make_talker(name, bench)
    config = SPECS[name].config.talker
    assert config is not None
    tokens = PROMPT + 2 + codes
    caches = [make_cache(config.decoder, tokens, bench) for _ in range(2)]
    context: Any = bench
    loop = TalkLoop(
        context,
        talker,
        caches[0],
        config,
        prompt_states=torch.zeros(PROMPT, bench.width, dtype=bench.dtype),
        positions=np.tile(np.arange(PROMPT), (3, 1)),
        voice_token=0,
        sampler=codec_sampler(config, sampling, seed=0),
        defaults=GenerationDefaults(eos_token_ids=(), codec_end_ids=()),
        max_codes=codes,
        chunk=512,
    )
    state = torch.zeros(1, bench.width, dtype=bench.dtype)
    bare = DecoderPasses(context, "talker", talker.model, caches[1], 512)
    x = torch.zeros(1, 1, config.decoder.hidden_size, dtype=bench.dtype, device=bench.device.torch)
    loop.begin(state)
    seconds: dict[str, list[float]] = {"loop": [], "pass": []}
    step = 0
    while not loop.ended:
        begun = time.perf_counter()
        loop.step(state if step < REPLY else None)
        bench.device.synchronize()
        middle = time.perf_counter()
        with bench.phase("talk"):
            bare.step(x, PROMPT + step)
        bench.device.synchronize()
        seconds["loop"].append(middle - begun)
        seconds["pass"].append(time.perf_counter() - middle)
        step += 1
    warm = {key: values[3:] for key, values in seconds.items()}
    ratios = [whole / part for whole, part in zip(*warm.values(), strict=True)]
    loop_s, pass_s = (statistics.median(values) for values in warm.values())
    return {
        "model": name,
        "codes": codes,
        "codes_per_s": round(1 / loop_s, 2),
        "pass_ms": round(pass_s * 1e3, 3),
        "step_ms": round(loop_s * 1e3, 3),
        "step_over_pass": round(statistics.median(ratios), 4),
        "recorded": in_place(bench.device.type, tokens) and not bench.notes,
        "notes": bench.notes,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--model", nargs="+", default=["Qwen2.5-Omni-3B"], choices=list(SPECS))
    parser.add_argument("--codes", type=int, default=60)
    parser.add_argument("--greedy", action="store_true", help="draw the likeliest code")
    parser.add_argument("--launched", action="store_true", help="record nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.launched:
        graph.recorder_for = lambda device: None
    sampling = SamplingSettings() if args.greedy else TALKER_SAMPLING
    rows = []
    for name in args.model:
        rows.append(
            measure(name, Bench(args.device, getattr(torch, args.dtype)), args.codes, sampling)
        )
        print(json.dumps(rows[-1]), flush=True)
    told = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "device": args.device,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "load_1_min": os.getloadavg()[0],
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
