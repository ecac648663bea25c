"""BigVGAN, the vocoder (arXiv 2206.04658): mel frames -> samples, 240 samples a frame.

Parameters are named relative to `token2wav.code2wav_bigvgan_model.`. The anti-aliasing filter is a
constant of the architecture and not in the checkpoint: it is made on the host and goes to the
device with each call, so that nothing outlives a dropped module.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowvram.config import BigVGANConfig

FILTER_TAPS = 12
RESAMPLING = 2
MIN_DECIBEL = -115.0
REFERENCE_DECIBEL = 20.0
SNAKE_EPSILON = 1e-9


LONGEST_TRANSPOSED = 6144
"""Samples, context included, that a depthwise transposed convolution is given at once on an NPU:
longer ones take ten times as long there (vllm-project/vllm-omni, pull request 7896)."""


@functools.cache
def _low_pass() -> Tensor:
    """Kaiser-windowed sinc that halves the band: fp32 [FILTER_TAPS] on the host, summing to one."""
    cutoff, half_width = 0.5 / RESAMPLING, 0.6 / RESAMPLING
    # Kaiser's design formulas: the stop band's attenuation in decibels, and the window for it.
    attenuation = 2.285 * (FILTER_TAPS // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7)
    window = torch.kaiser_window(
        FILTER_TAPS, periodic=False, beta=beta, dtype=torch.float32, device="cpu"
    )
    at = torch.arange(FILTER_TAPS, dtype=torch.float32, device="cpu") - (FILTER_TAPS - 1) / 2
    taps = 2 * cutoff * window * torch.sinc(2 * cutoff * at)
    return taps / taps.sum()


def _extend(x: Tensor, left: int, right: int) -> Tensor:
    """Repeats the edge values; by `cat`, because not every device pads that way in every type."""
    shape = x.shape[:-1]
    return torch.cat((x[..., :1].expand(*shape, left), x, x[..., -1:].expand(*shape, right)), -1)


def _upsample(x: Tensor, taps: Tensor) -> Tensor:
    """[1, C, T] -> [1, C, 2T]."""
    edge = FILTER_TAPS // RESAMPLING - 1
    trim = edge * RESAMPLING + (FILTER_TAPS - RESAMPLING) // 2
    weight = (RESAMPLING * taps).expand(x.shape[1], 1, -1)
    length = x.shape[-1]
    step = LONGEST_TRANSPOSED - 2 * edge if x.device.type == "npu" else length
    x = _extend(x, edge, edge)

    def piece(start: int) -> Tensor:
        part = x[..., start : min(start + step, length) + 2 * edge]
        part = F.conv_transpose1d(part, weight, stride=RESAMPLING, groups=weight.shape[0])
        return part[..., trim:-trim]

    if step >= length:
        return piece(0)
    out = x.new_empty(*x.shape[:-1], RESAMPLING * length)
    for start in range(0, length, step):
        out[..., RESAMPLING * start : RESAMPLING * min(start + step, length)] = piece(start)
    return out


def _downsample(x: Tensor, taps: Tensor) -> Tensor:
    """[1, C, 2T] -> [1, C, T]."""
    weight = taps.expand(x.shape[1], 1, -1)
    x = _extend(x, FILTER_TAPS // 2 - 1, FILTER_TAPS // 2)
    return F.conv1d(x, weight, stride=RESAMPLING, groups=weight.shape[0])


class Snake(nn.Module):
    """x + sin(a x)^2 / b with a and b stored as logarithms per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wave = (x * self.alpha.exp()[:, None]).sin_().square_()
        return wave.mul_((self.beta.exp() + SNAKE_EPSILON).reciprocal()[:, None]).add_(x)


class Activation(nn.Module):
    """Snake at twice the rate, low-passed on the way up and on the way down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act = Snake(channels)

    def forward(self, x: Tensor, taps: Tensor) -> Tensor:
        return _downsample(self.act(_upsample(x, taps)), taps)


class ResidualBlock(nn.Module):
    """Dilated convolutions with anti-aliased activations (AMP block): [1, C, T] -> [1, C, T]."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            padding = dilation * (kernel - 1) // 2
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations = nn.ModuleList(Activation(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor, taps: Tensor) -> Tensor:
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            y = dilated(self.activations[2 * i](x, taps))
            y = plain(self.activations[2 * i + 1](y, taps))
            x = y.add_(x)
        return x


class BigVGAN(nn.Module):
    """Log-mel frames [T, mel_dim] -> samples [T * samples_per_frame] in [-1, 1].

    A sample hears 34 frames to each side, but hardly the outermost: see `VocodeSettings`.
    """

    def __init__(self, config: BigVGANConfig) -> None:
        super().__init__()
        widths = [
            config.upsample_initial_channel >> i for i in range(len(config.upsample_rates) + 1)
        ]
        self.conv_pre = nn.Conv1d(config.mel_dim, widths[0], 7, padding=3)
        ups, blocks = [], []
        for i, (rate, kernel) in enumerate(
            zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
        ):
            up = nn.ConvTranspose1d(
                widths[i], widths[i + 1], kernel, rate, padding=(kernel - rate) // 2
            )
            # The published names carry one level more than is needed (`ups.0.0.weight`).
            ups.append(nn.Sequential(up))
            for size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                blocks.append(ResidualBlock(widths[i + 1], size, dilations))
        self.ups = nn.ModuleList(ups)
        self.resblocks = nn.ModuleList(blocks)
        self.activation_post = Activation(widths[-1])
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=False)

    @torch.no_grad()
    def forward(self, mel: Tensor) -> Tensor:
        taps = _low_pass().to(mel)
        x = self.conv_pre(_normalised(mel).T[None])
        per_rate = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(x)
            total = self.resblocks[i * per_rate](x, taps)
            for j in range(i * per_rate + 1, (i + 1) * per_rate):
                total.add_(self.resblocks[j](x, taps))
            x = total.div_(per_rate)
        x = self.conv_post(self.activation_post(x, taps))
        return x.clamp(-1, 1)[0, 0]


def _normalised(mel: Tensor) -> Tensor:
    """Natural-log mel amplitudes -> decibels over the range the vocoder knows, in [-1, 1]."""
    floor = math.exp(MIN_DECIBEL / 20 * math.log(10))
    decibel = 20 * torch.log10(mel.exp().clamp(min=floor)) - REFERENCE_DECIBEL
    return (2 * ((decibel - MIN_DECIBEL) / -MIN_DECIBEL) - 1).clamp(-1, 1)
