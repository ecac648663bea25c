"""The Thinker's text model with packed random weights, as the engine runs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram.config import ThinkerConfig
from lowvram.models import KVCache, ThinkerText
from lowvram.quant import HeadBits, PlainLinear, QuantLinear, RoundedHead, Scratch, kernel_phase

SPREAD = 0.02
"""Standard deviation that random weights imitate; only their bytes matter to the clock."""


class PackedThinker:
    """Packed layers and a 16-bit head, in bfloat16 on the CPU; `heads` maps names to heads."""

    def __init__(self, config: ThinkerConfig, group: int, context: int, prompt: int) -> None:
        scratch = Scratch()

        def linear(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
            if name.endswith("lm_head"):
                return PlainLinear(inputs, outputs, bias=bias)
            return QuantLinear(
                inputs,
                outputs,
                bias,
                group,
                dtype=torch.bfloat16,
                scales_dtype=torch.bfloat16,
                scratch=scratch,
            )

        text = config.text
        with torch.device("meta"):
            self.model = ThinkerText(config, linear).requires_grad_(False)
        for module in self.model.model.layers:
            _fill(module)
        _fill(self.model.model.norm)
        _fill(self.model.lm_head)
        self.heads: dict[str, nn.Module] = {"16-bit": self.model.lm_head}
        self._prompt = torch.randn(1, prompt, text.hidden_size).bfloat16()
        self._context = context
        self._cache = KVCache(
            text.num_hidden_layers,
            1,
            text.num_key_value_heads,
            max(prompt, context + 1),
            text.head_dim,
            torch.bfloat16,
            "cpu",
        )
        self._cache.data.fill_(0.01)

    def add_head(self, name: str, bits: HeadBits) -> None:
        """A head rounded from the same weights."""
        dense = self.model.lm_head
        assert isinstance(dense, nn.Linear)
        head = RoundedHead(dense.in_features, dense.out_features, bits)
        weight = dense.weight.data
        head.fill_from(lambda start, stop: weight[start:stop], weight.device)
        self.heads[name] = head

    def step(self, head: str) -> Tensor:
        """Logits of one token after `context` others; every call takes the same place."""
        with kernel_phase("decode"), torch.inference_mode():
            return self._run(self._prompt[:, :1], self._context, head)

    def prefill(self, head: str, tokens: int) -> Tensor:
        """Logits of the last of the prompt's first `tokens`."""
        with kernel_phase("prefill"), torch.inference_mode():
            return self._run(self._prompt[:, :tokens], 0, head)

    def bytes_per_token(self, head: str) -> int:
        """Bytes that decoding one token reads: layers, head, and keys and values so far."""
        kept = [*self.model.model.parameters(), *self.model.model.buffers()]
        of_head = [*self.heads[head].parameters(), *self.heads[head].buffers()]
        one_place = self._cache.nbytes // self._cache.max_tokens
        return sum(t.nbytes for t in (*kept, *of_head)) + one_place * self._context

    def _run(self, x: Tensor, start: int, head: str) -> Tensor:
        decoder = self.model.model
        positions = torch.arange(start, start + x.shape[1]).expand(3, 1, -1)
        hidden = decoder(x, decoder.rope(positions, x.dtype), self._cache, start)
        out: Tensor = self.heads[head](hidden[:, -1])
        return out.float()


def _fill(module: nn.Module) -> None:
    """Random weights for a module built on meta, and what is done after a load."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                value = random_weight(tuple(parameter.shape))
                part._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is None:
                continue
            if buffer.dtype == torch.int32:
                value = torch.randint(-(2**31), 2**31, tuple(buffer.shape), dtype=torch.int32)
            else:
                value = torch.full(tuple(buffer.shape), SPREAD / 4, dtype=torch.bfloat16)
            part._buffers[name] = value
    for part in module.modules():
        if callable(hook := getattr(part, "after_load", None)):
            hook()


def random_weight(shape: tuple[int, ...]) -> Tensor:
    """bfloat16; ones where it is a vector, as norms are."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-SPREAD, SPREAD)
