"""What all utterances of a checkpoint share, computed once and kept on the host.

The shifts, scales and gates of a time grid and the speaker vector of a voice depend on nothing
else, and what makes them is 42 % of the DiT's weights and its speaker encoder: a later request
need not read the ones nor run the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowvram.models.dit import Speaker
from lowvram.settings import Solver


class Constants:
    """Modulations by solver and grid (4.9 MB for the published Euler grid, 15.4 MB for `rk4`), and
    speakers by name (8 KB each)."""

    def __init__(self) -> None:
        self._modulations: dict[tuple[Solver, int], Tensor] = {}
        self._speakers: dict[str, Speaker] = {}

    def modulation(self, solver: Solver, points: int, make: Callable[[], Tensor]) -> Tensor:
        """[times, rows, hidden] for a grid of so many points, on the host; by `make` at first."""
        key = solver, points
        if key not in self._modulations:
            self._modulations[key] = _on_host(make())
        return self._modulations[key]

    def speaker(self, voice: str, make: Callable[[], Speaker]) -> Speaker:
        """Of the voice of that name, on the host; by `make` at first."""
        if voice not in self._speakers:
            made = make()
            self._speakers[voice] = Speaker(
                _on_host(made.conditioned), _on_host(made.unconditioned)
            )
        return self._speakers[voice]

    def has_modulation(self, solver: Solver, points: int) -> bool:
        """Whether it need not be made."""
        return (solver, points) in self._modulations

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        voices = self._speakers.values()
        return [
            *self._modulations.values(),
            *(tensor for one in voices for tensor in (one.conditioned, one.unconditioned)),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def clear(self) -> None:
        """Keep nothing; what is needed is made anew."""
        self._modulations.clear()
        self._speakers.clear()


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return tensor.to("cpu")
