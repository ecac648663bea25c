"""How long a phase takes: the slowest of what must pass through memory, bus, disk and arithmetic.

Speeds are assumptions by type of device, good for choosing between plans and for nothing finer.
No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.planner.plan import Bound


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Assumed speeds: bytes a second of the device's memory, of copies from host memory and of the
    disk, and floating-point operations a second in 16 bits."""

    memory: float
    bus: float
    disk: float
    compute: float


_ACCELERATOR = Rates(memory=400e9, bus=20e9, disk=2e9, compute=40e12)

ASSUMED_RATES = {
    "cuda": _ACCELERATOR,
    "npu": _ACCELERATOR,
    "meta": _ACCELERATOR,
    "cpu": Rates(memory=20e9, bus=10e9, disk=1.5e9, compute=0.25e12),
}
"""A card of the middle class behind PCIe 4.0; a desktop's processor; an SSD."""

EXPECTED_TOKENS = 256
"""Of a reply, where it may be longer: what times and bytes moved are predicted for."""

EXPECTED_CODES = 500
"""Of its speech, 10 s."""

NOT_OVERLAPPED = 0.1
"""Share of what could happen meanwhile that does not."""

UNPACKING_BYTES = 24
"""Through memory for each 4-bit weight that is de-quantized by plain operations: written and read
as integers, as fp32, and once more as 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one phase passes through each bottleneck: bytes, and operations."""

    memory: float = 0
    bus: float = 0
    disk: float = 0
    compute: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            memory=self.memory + other.memory,
            bus=self.bus + other.bus,
            disk=self.disk + other.disk,
            compute=self.compute + other.compute,
        )

    def times(self, rates: Rates) -> dict[Bound, float]:
        """Seconds at each bottleneck alone."""
        return {
            "memory": self.memory / rates.memory,
            "bus": self.bus / rates.bus,
            "disk": self.disk / rates.disk,
            "compute": self.compute / rates.compute,
        }

    def seconds(self, rates: Rates) -> float:
        """The slowest, and a share of the others: they overlap, but never wholly."""
        times = (
            self.memory / rates.memory,
            self.bus / rates.bus,
            self.disk / rates.disk,
            self.compute / rates.compute,
        )
        slowest = max(times)
        return slowest + NOT_OVERLAPPED * (sum(times) - slowest)


def loading(nbytes: float, rates: Rates) -> float:
    """Seconds to bring weights from the file to the device, during which nothing is computed."""
    return nbytes / min(rates.disk, rates.bus)
