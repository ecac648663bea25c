"""The DiT of Qwen2.5-Omni: the velocity field that carries noise to mel frames, given codes.

Parameters are named relative to `token2wav.code2wav_dit_model.`. One code is `repeats` mel frames;
attention stays within blocks of `block_size` frames, but for three layers that also see the block
before (`look_backward_layers`) or after (`look_ahead_layers`) their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram.config import DiTConfig
from lowvram.errors import CheckpointError
from lowvram.models.attention import attention
from lowvram.models.ecapa import SpeakerEncoder
from lowvram.models.modulation import Modulation, TimeEmbedding
from lowvram.models.past import Held, Neighbour

GUIDANCE = 0.5
"""Weight of classifier-free guidance: the default of `Qwen2_5OmniToken2WavModel.forward`."""

NORM_EPSILON = 1e-6
SHIFTS_PER_LAYER = 6


@dataclass(frozen=True)
class Speaker:
    """What a voice adds to the input projection of every frame, [hidden] for each branch.

    `unconditioned` is the whole input of that branch besides the mel: no speaker and code 0.
    """

    conditioned: Tensor
    unconditioned: Tensor

    def to(self, device: torch.device) -> Speaker:
        """The same there."""
        return Speaker(self.conditioned.to(device), self.unconditioned.to(device))


@dataclass(frozen=True)
class Condition:
    """What stays the same over all evaluations of one piece of `n` codes.

    `codes` is [n, hidden], the conditioned input besides the mel; `rope` is a pair of tables of
    cosines and sines [.., head_dim / 2] with a row for each of its frames, and for those before
    them that are kept. The last frame that is seen takes the last row.
    """

    codes: Tensor
    unconditioned: Tensor
    rope: tuple[Tensor, Tensor]

    def of(self, codes: slice) -> Condition:
        """The same for some of the codes."""
        return Condition(self.codes[codes], self.unconditioned, self.rope)


class Attention(nn.Module):
    """Attention in blocks of frames; rotary positions on the first head only, as it was trained."""

    def __init__(self, config: DiTConfig, look_back: int, look_ahead: int) -> None:
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.split = (config.num_attention_heads, config.head_dim)
        self.block, self.look_back, self.look_ahead = config.block_size, look_back, look_ahead
        self.to_q = nn.Linear(config.hidden_size, inner)
        self.to_k = nn.Linear(config.hidden_size, inner)
        self.to_v = nn.Linear(config.hidden_size, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, config.hidden_size)])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: Neighbour | None, frames: int
    ) -> Tensor:
        """Of the first `frames` of `x`; the others are only seen."""
        after = x.shape[1] - frames
        k = self.to_k(x).unflatten(-1, self.split)
        v = self.to_v(x).unflatten(-1, self.split)
        if past is not None and self.look_back:
            k, v = past.joined(k, v)
        k = _rotate_first_head(k, rope)
        q = _rotate_first_head(self.to_q(x[:, :frames]).unflatten(-1, self.split), rope, after)
        heads = block_attention(
            q,
            k,
            v,
            block=self.block,
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            after=after,
        )
        return self.to_out[0](heads.flatten(-2))


def _rotate_first_head(x: Tensor, rope: tuple[Tensor, Tensor], after: int = 0) -> Tensor:
    """Rotates pairs of neighbouring values of head 0 of [B, T, heads, D], in place.

    The pairs come out as two halves, which queries and keys share and their product does not see.
    The tables have `after` rows more than the last frame's.
    """
    stop = len(rope[0]) - after
    cos, sin = (table[stop - x.shape[1] : stop] for table in rope)
    even, odd = x[:, :, 0, 0::2], x[:, :, 0, 1::2]
    x[:, :, 0] = torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return x


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block: int, look_back: int, look_ahead: int, after: int = 0
) -> Tensor:
    """Attention of [B, T, heads, D] within blocks of frames and their neighbours; no mask.

    Blocks count from the first query and the last may be short; keys and values may begin earlier,
    and end `after` frames later. Blocks that see equally many keys run as one batch: the inner
    ones, and each kind of block at the edges.
    """
    pieces = []
    past = k.shape[1] - q.shape[1] - after
    for first, count, queries, before, keys in _alike_blocks(
        q.shape[1], block, look_back, look_ahead, past, after
    ):
        start = first * block
        piece = attention(
            _windows(q, start, count, queries, block),
            _windows(k, past + start - before, count, keys, block),
            _windows(v, past + start - before, count, keys, block),
            causal=False,
        )
        # [B * count, heads, queries, D] -> [B, count * queries, heads, D]
        pieces.append(piece.transpose(1, 2).reshape(q.shape[0], -1, *q.shape[2:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _alike_blocks(
    frames: int, block: int, look_back: int, look_ahead: int, past: int, after: int
) -> list[tuple[int, int, int, int, int]]:
    """Runs of blocks with the same shape: (first block, blocks, queries, frames before, keys)."""
    runs: list[tuple[int, int, int, int, int]] = []
    for i, start in enumerate(range(0, frames, block)):
        queries = min(block, frames - start)
        before = min(look_back * block, past + start)
        keys = before + min((1 + look_ahead) * block, frames + after - start)
        if runs and runs[-1][2:] == (queries, before, keys):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, queries, before, keys)
        else:
            runs.append((i, 1, queries, before, keys))
    return runs


def _windows(x: Tensor, start: int, count: int, length: int, step: int) -> Tensor:
    """`count` windows of `length` frames, `step` apart: [B, T, H, D] -> [B*count, H, length, D]."""
    if count == 1:
        return x[:, start : start + length].transpose(1, 2)
    parts = [
        x[:, at : at + count * step].unflatten(1, (count, step))
        for at in range(start, start + length, step)
    ]
    windows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return windows.flatten(0, 1).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linears around a tanh-approximated GELU; the names count a dropout between them."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(
            nn.Linear(hidden, inner),
            nn.GELU(approximate="tanh"),
            nn.Identity(),
            nn.Linear(inner, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class Block(nn.Module):
    """One transformer layer: [B, T, hidden] -> the same, changed in place; of frames that `held`
    lets through the first, which see the others."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        super().__init__()
        self.attn_norm = Modulation(config.hidden_size, SHIFTS_PER_LAYER)
        self.attn = Attention(
            config,
            look_back=int(index in config.look_backward_layers),
            look_ahead=int(index in config.look_ahead_layers),
        )
        self.ff = FeedForward(config.hidden_size, config.hidden_size * config.ff_mult)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Neighbour | None = None,
        held: Held | None = None,
    ) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(0)
        frames = x.shape[1] if held is None else held.frames
        attended = self.attn(_modulated(x, scale, shift), rope, past, frames)
        x = x[:, :frames].add_(attended.mul_(gate))
        return x.add_(self.ff(_modulated(x, ff_scale, ff_shift)).mul_(ff_gate))


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON).mul_(1 + scale).add_(shift)


class CodeEmbedding(nn.Module):
    """The codec's table. It has one row more than there are codes."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.codec_embed = nn.Embedding(config.num_embeds + 1, config.emb_dim)


class InputEmbedding(nn.Module):
    """The input projection, whose columns take mel, speaker vector, code and voice condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.columns = [config.mel_dim, config.enc_dim, config.emb_dim, config.enc_emb_dim]
        self.proj = nn.Linear(sum(self.columns), config.hidden_size)
        self.spk_encoder = SpeakerEncoder(config)

    def weights(self) -> tuple[Tensor, ...]:
        """The projection's weight in its four parts: mel, speaker vector, code, voice condition."""
        return self.proj.weight.split(self.columns, dim=1)


def _check(config: DiTConfig) -> None:
    """Refuses what pieces and windows cannot be cut from."""
    if config.block_size % config.repeats:
        raise CheckpointError(
            f"the DiT's block_size is {config.block_size} and repeats {config.repeats}; wanted "
            "blocks of whole codes: download the checkpoint again"
        )
    known = set(range(config.num_hidden_layers))
    for name in ("look_ahead_layers", "look_backward_layers"):
        layers = getattr(config, name)
        if len(set(layers)) < len(layers) or not known.issuperset(layers):
            raise CheckpointError(
                f"the DiT's {name} are {list(layers)}; wanted different ones of its "
                f"{config.num_hidden_layers} layers: download the checkpoint again"
            )


class DiT(nn.Module):
    """The velocity field with guidance.

    What does not depend on the evaluation is computed apart, by `modulate` (once per time grid),
    `speaker` (once per voice) and `condition` (once per piece of codes).
    """

    def __init__(self, config: DiTConfig, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is that of the layers' linears and of what passes between them. What is done
        once, the way in and out, guidance and the flow's states stay in fp32."""
        super().__init__()
        self.config, self.dtype = config, dtype
        _check(config)
        self.time_embed = TimeEmbedding(config.hidden_size)
        self.text_embed = CodeEmbedding(config)
        self.input_embed = InputEmbedding(config)
        self.transformer_blocks = nn.ModuleList(
            Block(config, i) for i in range(config.num_hidden_layers)
        )
        for module in self.transformer_blocks.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
                # For the loader, see `Part`.
                module.__dict__["stored_dtypes"] = {"weight": dtype, "bias": dtype}
        self.norm_out = Modulation(config.hidden_size, 2)
        self.proj_out = nn.Linear(config.hidden_size, config.mel_dim)

    @property
    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.transformer_blocks]

    @torch.no_grad()
    def modulate(self, times: Tensor) -> Tensor:
        """Every layer's shifts, scales and gates at `times` (fp32 [E] on the host).

        Returns [E, 6 * layers + 2, hidden]; an index of the first axis is what `forward` takes.
        """
        time = F.silu(self.time_embed(times))
        norms = [*(block.attn_norm for block in self._blocks), self.norm_out]
        out = time.new_empty(len(times), sum(norm.rows for norm in norms), time.shape[1])
        for norm, rows in zip(norms, out.split([norm.rows for norm in norms], 1), strict=True):
            norm(time, rows)
        return out

    @torch.no_grad()
    def speaker(self, cond: Tensor, ref_mel: Tensor) -> Speaker:
        """What a voice adds to the input; `cond` is [1, enc_emb_dim], `ref_mel` [1, T, mel_dim].

        The unconditioned branch has a silent reference and no condition, and code 0 throughout.
        """
        weight = self.input_embed.proj.weight
        cond, ref_mel = cond.to(weight), ref_mel.to(weight)
        _, encoded_weight, code_weight, cond_weight = self.input_embed.weights()
        encoded = self.input_embed.spk_encoder(torch.cat((ref_mel, torch.zeros_like(ref_mel))))
        voiced, silent = F.linear(encoded, encoded_weight, self.input_embed.proj.bias)
        code_zero = F.linear(self.text_embed.codec_embed.weight[0], code_weight)
        return Speaker(voiced + F.linear(cond[0], cond_weight), silent + code_zero)

    @torch.no_grad()
    def condition(self, codes: Tensor, speaker: Speaker, past_frames: int = 0) -> Condition:
        """The constant input of one piece; `codes` is int64 [n] on the device.

        Of `past_frames` before it keys and values are kept in a `Past`.
        """
        code_weight = self.input_embed.weights()[2]
        embedded = F.linear(self.text_embed.codec_embed(codes), code_weight)
        rope = self._rope(past_frames + codes.shape[0] * self.config.repeats, embedded)
        return Condition(embedded + speaker.conditioned, speaker.unconditioned, rope)

    def _rope(self, frames: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [frames, head_dim / 2]. Only distances matter, so frames count from
        the first that is seen, and angles stay small however long the speech is."""
        size = self.config.head_dim
        steps = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")
        inverse = 1.0 / self.config.rope_theta ** (steps / size)
        angles = torch.arange(frames, dtype=torch.float32, device="cpu")[:, None] * inverse
        return angles.cos().to(like), angles.sin().to(like)

    @torch.no_grad()
    def forward(
        self,
        mel: Tensor,
        modulation: Tensor,
        condition: Condition,
        past: Sequence[Neighbour] = (),
        held: Sequence[Held] = (),
    ) -> Tensor:
        """The guided velocity at one time, [T, mel_dim] as `mel`; T is `repeats` frames a code.

        `past` has one `Neighbour` for each layer that looks back, if the piece is not the whole,
        and `held` one `Held` for each that looks ahead, if it is to wait for what follows. Then
        the velocity is that of other frames: those that the last of them lets through.
        """
        x = self._input(mel, condition).to(self.dtype)
        layers = modulation[:-2].to(self.dtype).split(SHIFTS_PER_LAYER)
        neighbours, waiting = iter(past), iter(held)
        for block, rows in zip(self._blocks, layers, strict=True):
            before = next(neighbours, None) if block.attn.look_back else None
            waits = next(waiting) if held and block.attn.look_ahead else None
            if waits is not None:
                x = waits.joined(x)
            if x.shape[1] and (waits is None or waits.frames):
                x = block(x, rows, condition.rope, before, waits)
            else:
                x = x[:, :0]
        if not x.shape[1]:
            return mel[:0]
        scale, shift = modulation[-2:].unbind(0)
        last = _modulated(x.to(modulation), scale, shift)
        conditioned, unconditioned = self.proj_out(last).unbind(0)
        return conditioned + (conditioned - unconditioned) * GUIDANCE

    def _input(self, mel: Tensor, condition: Condition) -> Tensor:
        """[2, T, hidden]: the conditioned branch and the unconditioned one."""
        projected = F.linear(mel, self.input_embed.weights()[0])
        per_code = projected.unflatten(0, (len(condition.codes), self.config.repeats))
        conditioned = (per_code + condition.codes[:, None]).flatten(0, 1)
        return torch.stack((conditioned, projected + condition.unconditioned))
