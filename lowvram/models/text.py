"""The Qwen2 decoder with TMRoPE, and the Thinker's text model built on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram.config import DecoderConfig, ThinkerConfig
from lowvram.models.attention import attention
from lowvram.models.kv_cache import KVCache
from lowvram.models.layers import GatedMLP, RMSNorm
from lowvram.models.linear import LinearFactory
from lowvram.models.rope import Rope, mrope, rotate
from lowvram.quant import NativeLayer, apply_joined, current_phase, join


class SelfAttention(nn.Module):
    """Causal attention of new tokens to themselves and to what the cache holds."""

    def __init__(self, config: DecoderConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = config.head_dim, config.num_key_value_heads
        inner = config.num_attention_heads * config.head_dim
        kv_inner = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(f"{name}.q_proj", config.hidden_size, inner, True)
        self.k_proj = linear(f"{name}.k_proj", config.hidden_size, kv_inner, True)
        self.v_proj = linear(f"{name}.v_proj", config.hidden_size, kv_inner, True)
        self.o_proj = linear(f"{name}.o_proj", inner, config.hidden_size, False)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache, index: int, start: int) -> Tensor:
        q, k, v = self._project(x, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        keys, values = cache.write(index, start, k, v)
        mixed = attention(q, keys, values, causal=True, bias=cache.bias)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned, and values, each [B, T, heads, head_dim]."""
        together = apply_joined((self.q_proj, self.k_proj, self.v_proj), x)
        if together is None:
            q, k, v = (self._heads(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
            return rotate(q, rope), rotate(k, rope), v
        q_and_k, v = self._heads(together).tensor_split([-self.kv_heads], dim=2)
        q, k = rotate(q_and_k, rope).tensor_split([-self.kv_heads], dim=2)
        return q, k, v

    def after_load(self) -> None:
        """Packed linears that read the same become one."""
        join((self.q_proj, self.k_proj, self.v_proj))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class DecoderLayer(nn.Module):
    """One layer; `index` is its place in the cache."""

    def __init__(self, config: DecoderConfig, linear: LinearFactory, name: str, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = SelfAttention(config, linear, f"{name}.self_attn")
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, linear, f"{name}.mlp", bias=False
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._shape = config.hidden_size, config.intermediate_size, config.head_dim
        self._heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._offered: bool | None = None
        self.as_built()

    def as_built(self) -> None:
        """Weights come and go: what was made of their addresses is void."""
        self._native: NativeLayer | None = None
        self._stays = False

    def after_load(self) -> None:
        """These weights stay where they are. What is to be compiled is compiled now, not while
        somebody waits for a token."""
        weight = self.input_layernorm.weight
        self._stays = True
        if weight.is_cpu and weight.dtype == torch.bfloat16:
            self._is_offered()

    def forward(self, x: Tensor, rope: Rope, cache: KVCache, start: int) -> Tensor:
        """[B, T, H] -> [B, T, H]; tokens `start` to `start + T` are written to the cache."""
        native = self._in_one_call(x, cache)
        if native is not None:
            return native(x, rope, *cache.layer(self.index), start)
        # The sums go into the fresh outputs of the linears; `x` belongs to the caller.
        attended: Tensor = self.self_attn(self.input_layernorm(x), rope, cache, self.index, start)
        x = attended.add_(x)
        out: Tensor = self.mlp(self.post_attention_layernorm(x))
        return out.add_(x)

    def _in_one_call(self, x: Tensor, cache: KVCache) -> NativeLayer | None:
        """What computes a token's step, where the compiled kernels do all of it. A cache that keeps
        keys and values in another form reads and writes them itself."""
        if not (x.is_cpu and x.dtype == torch.bfloat16 and x.shape[:2] == (1, 1)):
            return None
        if current_phase() != "decode" or type(cache) is not KVCache or cache.bias is not None:
            return None
        if not self._is_offered():
            return None
        if self._native is not None:
            return self._native
        norms = self.input_layernorm, self.post_attention_layernorm
        attention, mlp = self.self_attn, self.mlp
        made = NativeLayer.of(
            project=(attention.q_proj, attention.k_proj, attention.v_proj),
            mix=attention.o_proj,
            open=(mlp.gate_proj, mlp.up_proj),
            close=mlp.down_proj,
            norms=(norms[0].weight, norms[1].weight),
            epsilon=norms[0].eps,
            heads=self._heads,
        )
        # What streams is somewhere else the next time.
        self._native = made if self._stays else None
        return made

    def _is_offered(self) -> bool:
        if self._offered is None:
            self._offered = NativeLayer.offered(*self._shape)
        return self._offered


class Decoder(nn.Module):
    """Layers and final norm of a Qwen2 decoder. `name` is its checkpoint name (`thinker.model`)."""

    def __init__(self, config: DecoderConfig, linear: LinearFactory, name: str) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            DecoderLayer(config, linear, f"{name}.layers.{i}", i)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """Tables for `forward`, on the device of the weights.

        Args:
            positions: int64 [3, B, T], time, height and width; best left on the host, where the
                tables are then made in fp32, the same for every device.
            dtype: that of the activations.
        """
        cos, sin = self.tables(positions, dtype)
        device = self.norm.weight.device
        return cos.to(device), sin.to(device)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """As `rope`, left where the positions are: each [B, T, 1, head_dim]."""
        config = self.config
        cos, sin = mrope(positions, config.mrope_section, config.head_dim, config.rope_theta)
        return cos.to(dtype), sin.to(dtype)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache, start: int) -> Tensor:
        """Run tokens `start` to `start + T` of a sequence whose first `start` are in the cache.

        Args:
            x: [B, T, H] embeddings; left as they are.
            rope: from `rope`, for these T tokens.
            cache: holds `start` tokens, and `start + T` afterwards.

        Returns:
            [B, T, H] hidden states after the final norm.
        """
        for layer in self.layers:
            x = layer(x, rope, cache, start)
        normed: Tensor = self.norm(x)
        return normed


class ThinkerText(nn.Module):
    """The Thinker without its towers and its embedding, whose rows are read on the host.
    Parameters are named as in the checkpoint, after `thinker.`."""

    def __init__(self, config: ThinkerConfig, linear: LinearFactory) -> None:
        super().__init__()
        text = config.text
        self.model = Decoder(text, linear, "thinker.model")
        self.lm_head = linear("thinker.lm_head", text.hidden_size, text.vocab_size, False)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [B, V] of hidden states [B, H], such as those of the last position."""
        scores: Tensor = self.lm_head(hidden)
        return scores.float()
