"""The entry of a `config.json` that says how its packed linears are to be read."""

from __future__ import annotations

from typing import Any

_KEPT = ("visual", "audio_tower", "talker", "token2wav", "code2wav", "lm_head")
"""Parts of a Qwen2.5-Omni whose linears are not packed, by a piece of their tensors' names."""


def quantization_config(group_size: int) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose Thinker text layers are packed.

    The list of what was not converted is read in two ways: as substrings of a module's name
    (AutoAWQ, vLLM, transformers to 4.56) and as regular expressions that must match from the
    name's first character (transformers from 5.0). It holds every part in both forms. `sym` says
    the same as `zero_point` to readers of GPTQ's words; auto-round takes true where it is missing,
    and reads noise.
    """
    return {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": [*_KEPT, *(f".*{part}.*" for part in _KEPT)],
        "quant_method": "awq",
        "sym": False,
        "version": "gemm",
        "zero_point": True,
    }
