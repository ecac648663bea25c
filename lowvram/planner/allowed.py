"""Options that may change results and are used only where they are allowed, by name. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lowvram.errors import UsageError
from lowvram.tensors import Part

HEADS = ("head8", "head4")
"""Round the Thinker's output layer."""

OPTIONS = (*HEADS, "talker8", "kv8", "vocoder16")
"""`talker8`: the linears of the Talker's layers in int8, a scale for every output. `kv8`: keys and
values in int8, a scale for 32 numbers. `vocoder16`: the DiT of the vocoder in 16 bits."""

CONCERNS: Mapping[str, Part] = {
    "head8": "text",
    "head4": "text",
    "talker8": "talker",
    "vocoder16": "token2wav",
}
"""The module that is built otherwise with an option."""


def options_of(part: str, used: Collection[str]) -> frozenset[str]:
    """Those of `used` that change how a module is built."""
    return frozenset(name for name in used if CONCERNS.get(name) == part)


def vocoder_dtype(device_type: str, has_bfloat16: bool) -> str:
    """What `vocoder16` computes in on a type of device."""
    return "bfloat16" if has_bfloat16 and device_type != "npu" else "float16"


def check_options(allow: Sequence[str]) -> None:
    """Raises UsageError for a name that is none of `OPTIONS`."""
    if isinstance(allow, str):
        raise UsageError(f"allow is {allow!r}; wanted a list of names, as in ['head8', 'talker8']")
    for name in allow:
        if name not in OPTIONS:
            raise UsageError(
                f"unknown option {name!r} in allow; wanted some of {', '.join(OPTIONS)}"
            )
