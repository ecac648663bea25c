"""The same text model as transformers runs it, in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram.bench.thinker import random_weight

DISTINCT_LAYERS = 9
"""Layers with weights of their own; the rest share them in turn, to keep within a few GB. What
lies between two uses of a weight is still many times any cache."""


class PublishedThinker:
    """`Qwen2_5OmniThinkerTextModel` with random weights, without its embedding; and a head."""

    def __init__(self, text: Mapping[str, Any], context: int, prompt: int) -> None:
        from transformers import DynamicCache
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as published
        from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
            Qwen2_5OmniTextConfig,
        )

        config = Qwen2_5OmniTextConfig(**text)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = published.Qwen2_5OmniThinkerTextModel(config)
        del model.embed_tokens
        # Its tables are computed where it is built.
        model.rotary_emb = type(model.rotary_emb)(config)
        _fill(model)
        self._model = model.eval().requires_grad_(False)
        self._head = random_weight((config.vocab_size, config.hidden_size))
        self._prompt = torch.randn(1, prompt, config.hidden_size).bfloat16()
        self._context = context
        self._new_cache = DynamicCache
        self._cache: Any = None

    def step(self) -> Tensor:
        """Logits of one token more, the first after `context` others."""
        if self._cache is None:
            self._cache = self._new_cache()
            self._run(self._prompt[:, : self._context], self._cache)
        return self._run(self._prompt[:, :1], self._cache)

    def prefill(self, tokens: int) -> Tensor:
        """Logits of the last of the prompt's first `tokens`."""
        return self._run(self._prompt[:, :tokens], self._new_cache())

    def _run(self, x: Tensor, cache: Any) -> Tensor:
        with torch.inference_mode():
            out = self._model(inputs_embeds=x, past_key_values=cache, use_cache=True)
            return F.linear(out.last_hidden_state[:, -1], self._head).float()


def _fill(model: nn.Module) -> None:
    pool: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        owner, _, local = name.rpartition(".")
        words = name.split(".")
        if words[0] == "layers":
            words[1] = str(int(words[1]) % DISTINCT_LAYERS)
        key = ".".join(words)
        if key not in pool:
            value = random_weight(tuple(parameter.shape))
            pool[key] = nn.Parameter(value, requires_grad=False)
        model.get_submodule(owner)._parameters[local] = pool[key]
