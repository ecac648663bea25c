"""The Talker: a decoder over codec tokens, driven by the Thinker's embeddings and states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram.config import TalkerConfig
from lowvram.models.kv_cache import KVCache
from lowvram.models.linear import LinearFactory, dense
from lowvram.models.rope import Rope
from lowvram.models.text import Decoder
from lowvram.quant import PlainLinear


class TalkerDecoder(Decoder):
    """A decoder that holds its own embedding, as wide as the Thinker's states."""

    def __init__(self, config: TalkerConfig, linear: LinearFactory) -> None:
        super().__init__(config.decoder, linear, "talker.model")
        self.embed_tokens = nn.Embedding(config.decoder.vocab_size, config.embedding_size)


class Talker(nn.Module):
    """Parameters are named as in the checkpoint, after `talker.`; `linear` makes those of the
    layers, which are nearly all of it."""

    def __init__(self, config: TalkerConfig, linear: LinearFactory = dense) -> None:
        super().__init__()
        decoder = config.decoder
        self.thinker_to_talker_proj = PlainLinear(config.embedding_size, decoder.hidden_size)
        self.model = TalkerDecoder(config, linear)
        self.codec_head = PlainLinear(decoder.hidden_size, decoder.vocab_size, bias=False)

    def embed(self, codes: Tensor) -> Tensor:
        """int64 [B, T] codec tokens -> [B, T, embedding_size], as wide as the Thinker's states."""
        rows: Tensor = self.model.embed_tokens(codes)
        return rows

    def project(self, x: Tensor) -> Tensor:
        """[B, T, embedding_size] -> the decoder's inputs [B, T, hidden_size]."""
        narrow: Tensor = self.thinker_to_talker_proj(x)
        return narrow

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """`Decoder.rope` for int64 positions [3, B, T]."""
        return self.model.rope(positions, dtype)

    def forward(self, inputs_embeds: Tensor, rope: Rope, cache: KVCache, start: int) -> Tensor:
        """[B, T, embedding_size] -> [B, T, hidden_size] after the final norm; see `Decoder`."""
        hidden: Tensor = self.model(self.project(inputs_embeds), rope, cache, start)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [B, vocab] over codec tokens, of hidden states [B, hidden_size]."""
        scores: Tensor = self.codec_head(hidden)
        return scores.float()
