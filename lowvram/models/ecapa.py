"""ECAPA-TDNN, the speaker encoder of the DiT (arXiv 2005.07143): reference mel -> one vector.

Parameters are named relative to `token2wav.code2wav_dit_model.input_embed.spk_encoder.`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowvram.config import DiTConfig

VARIANCE_FLOOR = 1e-12


def _conv(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(
        inputs, outputs, kernel, dilation=dilation, padding="same", padding_mode="reflect"
    )


class TimeDelay(nn.Module):
    """A dilated convolution over frames and a ReLU: [B, inputs, T] -> [B, outputs, T]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = _conv(inputs, outputs, kernel, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class Res2Net(nn.Module):
    """Channel groups filtered one after the other, each with the previous one's result added."""

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.blocks = nn.ModuleList(
            TimeDelay(width, width, kernel, dilation) for _ in range(scale - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(len(self.blocks) + 1, dim=1)
        parts = [first]
        for i, (block, part) in enumerate(zip(self.blocks, rest, strict=True)):
            parts.append(block(part if i == 0 else part + parts[-1]))
        return torch.cat(parts, dim=1)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all channels' means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, hidden)
        self.conv2 = _conv(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=2, keepdim=True)
        return x * torch.sigmoid(self.conv2(torch.relu(self.conv1(mean))))


class SERes2Net(nn.Module):
    """TDNN, Res2Net, TDNN and squeeze-excitation around a residual connection."""

    def __init__(self, config: DiTConfig, inputs: int, outputs: int, at: int) -> None:
        super().__init__()
        kernel, dilation = config.enc_kernel_sizes[at], config.enc_dilations[at]
        self.tdnn1 = TimeDelay(inputs, outputs)
        self.res2net_block = Res2Net(outputs, config.enc_res2net_scale, kernel, dilation)
        self.tdnn2 = TimeDelay(outputs, outputs)
        self.se_block = SqueezeExcitation(outputs, config.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x)))) + x


class AttentivePooling(nn.Module):
    """Mean and deviation over frames, weighted by attention: [B, C, T] -> [B, 2C, 1]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.tdnn = TimeDelay(3 * channels, hidden)
        self.conv = _conv(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        even = torch.full_like(x[:1, :1], 1 / x.shape[2])
        mean, deviation = _statistics(x, even)
        context = torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1)
        weights = torch.softmax(self.conv(torch.tanh(self.tdnn(context))), dim=2)
        return torch.cat(_statistics(x, weights), dim=1)


def _statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and deviation over frames, each [B, C, 1]; the weights sum to one."""
    mean = (weights * x).sum(dim=2, keepdim=True)
    variance = (weights * (x - mean).square()).sum(dim=2, keepdim=True)
    return mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()


class SpeakerEncoder(nn.Module):
    """Reference mel [B, frames, mel_dim] -> speaker vector [B, enc_dim]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        channels, kernels, dilations = (
            config.enc_channels,
            config.enc_kernel_sizes,
            config.enc_dilations,
        )
        self.blocks = nn.ModuleList(
            [TimeDelay(config.mel_dim, channels[0], kernels[0], dilations[0])]
        )
        for at in range(1, len(channels) - 1):
            self.blocks.append(SERes2Net(config, channels[at - 1], channels[at], at))
        self.mfa = TimeDelay(channels[-1], channels[-1], kernels[-1], dilations[-1])
        self.asp = AttentivePooling(channels[-1], config.enc_attention_channels)
        self.fc = _conv(2 * channels[-1], config.enc_dim)

    def forward(self, mel: Tensor) -> Tensor:
        x = mel.transpose(1, 2)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        pooled = self.asp(self.mfa(torch.cat(outputs[1:], dim=1)))
        return self.fc(pooled).squeeze(-1)
