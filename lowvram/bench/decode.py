"""`bench decode`: tokens a second of the Thinker's text model, against the memory's own speed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowvram.bench.clock import SUM_BYTES, Timing, measure, read_bandwidth
from lowvram.bench.llama import HEAD, LlamaThinker
from lowvram.bench.published import PublishedThinker
from lowvram.bench.thinker import PackedThinker
from lowvram.config import OmniConfig
from lowvram.errors import DeviceError
from lowvram.quant import choose_head

CONTEXT = 128
PROMPT = 512
GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Tokens a second are of the median run, and of the best; `bytes_per_token` is what decoding one
    token reads. `of_bound` compares the best decoding with the `bound` of the same bytes.
    """

    name: str
    head: str | None
    decode_tokens_s: float
    prefill_tokens_s: float | None
    bytes_per_token: int
    decode_tokens_s_best: float
    prefill_tokens_s_best: float | None = None
    of_bound: float | None = None

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
    rows = []
    for name, kind in (("ours", head), ("ours-16bit-head", "16-bit")):
        note(name)
        steps, prompts = _measured(ours, kind, seconds)
        rows.append(_row(name, kind, steps, prompts, ours.bytes_per_token(kind), bandwidth))
    read = rows[0].bytes_per_token
    del ours
    gc.collect()
    note("transformers-bf16")
    theirs = PublishedThinker(raw["thinker_config"]["text_config"], CONTEXT, PROMPT)
    steps, prompts = measure(theirs.step, seconds), measure(theirs.prefill, seconds)
    rows.append(
        _row("transformers-bf16", "16-bit", steps, prompts, _dense_bytes(config), bandwidth)
    )
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
    del theirs
    gc.collect()
    note("llama.cpp")
    try:
        with LlamaThinker(text, CONTEXT, PROMPT) as other:
            steps, prompts = measure(other.step, seconds), measure(other.prefill, seconds)
            nbytes = other.bytes_per_token()
    except DeviceError as error:
        note(f"no row for llama.cpp: {error}")
    else:
        rows.append(_row("llama.cpp", HEAD, steps, prompts, nbytes, bandwidth))
    return rows


def _measured(ours: PackedThinker, head: str, seconds: float) -> tuple[Timing, Timing]:
    steps = measure(lambda: ours.step(head), seconds)
    return steps, measure(lambda: ours.prefill(head), seconds)


def _row(
    name: str, head: str, steps: Timing, prompts: Timing, nbytes: int, bandwidth: float
) -> Row:
    return Row(
        name=name,
        head=head,
        decode_tokens_s=1 / steps.median,
        prefill_tokens_s=PROMPT / prompts.median,
        bytes_per_token=nbytes,
        decode_tokens_s_best=1 / steps.best,
        prefill_tokens_s_best=PROMPT / prompts.best,
        of_bound=nbytes / steps.best / bandwidth,
    )


def _dense_bytes(config: OmniConfig) -> int:
    """Bytes that one token reads of the same model at 16 bits."""
    text = config.thinker.text
    inner = text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    width = text.hidden_size
    layer = width * (2 * inner + 2 * kv) + 3 * width * text.intermediate_size
    values = text.num_hidden_layers * (layer + 2 * kv * CONTEXT) + width * text.vocab_size
    return 2 * values
