"""`bench decode`: tokens a second of the Thinker's text model, against the memory's own speed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from lowvram.bench.clock import SUM_BYTES, interleave, read_bandwidth
from lowvram.bench.llama import HEAD, LlamaThinker
from lowvram.bench.published import PublishedThinker
from lowvram.bench.thinker import PackedThinker
from lowvram.config import OmniConfig
from lowvram.errors import DeviceError
from lowvram.quant import choose_head

CONTEXT = 128
PROMPT, SHORT_PROMPT = 512, 128
"""Tokens of the prompts that are prefilled."""

GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Tokens a second are of the median run, and of the best; of prefill with a prompt of 512 tokens,
    and of 128 in `prefill_128_tokens_s`; `bytes_per_token` is what decoding one
    token reads. `of_bound` compares the best decoding with the `bound` of the same bytes. Ours and
    transformers' take turns; llama.cpp, whose threads would be in the way, comes after them.
    """

    name: str
    head: str | None
    decode_tokens_s: float
    prefill_tokens_s: float | None
    bytes_per_token: int
    decode_tokens_s_best: float
    prefill_tokens_s_best: float | None = None
    prefill_128_tokens_s: float | None = None
    of_bound: float | None = None
    threads: int = field(default_factory=torch.get_num_threads)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_decode(
    raw: Mapping[str, Any],
    allow: Sequence[str],
    *,
    seconds: float = 6.0,
    sum_bytes: int = SUM_BYTES,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Every row, in one run on the CPU.

    Args:
        raw: the `config.json` whose shapes are taken; weights are random.
        allow: options that may round the head.
        seconds: about how long each measurement goes on.
        sum_bytes: what the streaming sums go over.
        note: hears what is being done.
    """
    config = OmniConfig.from_dict(dict(raw))
    note("read bandwidth")
    bandwidth = read_bandwidth(sum_bytes)
    note("packed weights")
    text = config.thinker.text
    group = config.quant.group_size if config.quant else GROUP
    ours = PackedThinker(config.thinker, group, CONTEXT, PROMPT)
    head = "16-bit"
    choice = choose_head(allow, "cpu", text.hidden_size, text.vocab_size)
    if choice is not None and choice.bits is not None:
        head = f"{choice.bits}-bit"
        ours.add_head(head, choice.bits)
    note("transformers' weights")
    theirs = PublishedThinker(raw["thinker_config"]["text_config"], CONTEXT, PROMPT)
    works = [
        _Work(name, kind, ours.bytes_per_token(kind), *_of_head(ours, kind))
        for name, kind in (("ours", head), ("ours-16bit-head", "16-bit"))
    ]
    works.append(
        _Work("transformers-bf16", "16-bit", _dense_bytes(config), theirs.step, theirs.prefill)
    )
    rows = _measured(works, seconds, bandwidth, note)
    read = rows[0].bytes_per_token
    del ours, theirs, works
    gc.collect()
    bound = bandwidth / read
    rows.append(
        Row(
            name="bound",
            head=head,
            decode_tokens_s=bound,
            prefill_tokens_s=None,
            bytes_per_token=read,
            decode_tokens_s_best=bound,
        )
    )
    note("llama.cpp")
    try:
        with LlamaThinker(text, CONTEXT, PROMPT) as other:
            work = _Work("llama.cpp", HEAD, other.bytes_per_token(), other.step, other.prefill)
            rows += _measured([work], seconds, bandwidth, note)
    except DeviceError as error:
        note(f"no row for llama.cpp: {error}")
    return rows


@dataclass(frozen=True)
class _Work:
    """What is measured of a row: one step of decoding, and the prefill of so many tokens."""

    name: str
    head: str
    bytes_per_token: int
    step: Callable[[], object]
    prefill: Callable[[int], object]


def _of_head(
    ours: PackedThinker, head: str
) -> tuple[Callable[[], object], Callable[[int], object]]:
    """A step and a prefill that end in that head."""
    return partial(ours.step, head), partial(ours.prefill, head)


def _measured(
    works: Sequence[_Work], seconds: float, bandwidth: float, note: Callable[[str], None]
) -> list[Row]:
    """All in turns, the parts one after the other."""
    note("decoding, in turns")
    steps = interleave([work.step for work in works], seconds)
    note("prefill, in turns")
    prompts, short = (
        interleave([partial(work.prefill, tokens) for work in works], seconds)
        for tokens in (PROMPT, SHORT_PROMPT)
    )
    return [
        Row(
            name=work.name,
            head=work.head,
            decode_tokens_s=1 / step.median,
            prefill_tokens_s=PROMPT / prompt.median,
            bytes_per_token=work.bytes_per_token,
            decode_tokens_s_best=1 / step.best,
            prefill_tokens_s_best=PROMPT / prompt.best,
            prefill_128_tokens_s=SHORT_PROMPT / shorter.median,
            of_bound=work.bytes_per_token / step.best / bandwidth,
        )
        for work, step, prompt, shorter in zip(works, steps, prompts, short, strict=True)
    ]


def _dense_bytes(config: OmniConfig) -> int:
    """Bytes that one token reads of the same model at 16 bits."""
    text = config.thinker.text
    inner = text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    width = text.hidden_size
    layer = width * (2 * inner + 2 * kv) + 3 * width * text.intermediate_size
    values = text.num_hidden_layers * (layer + 2 * kv * CONTEXT) + width * text.vocab_size
    return 2 * values
