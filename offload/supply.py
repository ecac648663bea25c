"""Where streamed units come from: the file, pinned masters, or a pinned ring fed from the file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowvram.errors import DeviceError

from .blob import Blob, BlobReader
from .budget import MIB, format_size
from .carriers import Carrier, FileCarrier, NoCarrier, PinnedCarrier, RingCarrier
from .device import Device
from .host import host_memory
from .lane import CopyLane
from .pinned import pin, pinned_bytes
from .placement import Placement
from .slabs import Slabs
from .store import Store

HOST_RESERVE = 512 * MIB
"""Host memory that pinning leaves to everything else."""


class Supply:
    """Chooses the carrier of each part that streams, and keeps its pinned masters between loads."""

    def __init__(self, store: Store | None, device: Device) -> None:
        self._store, self._device = store, device
        self._masters: dict[str, tuple[tuple[int, ...], list[torch.Tensor]]] = {}
        self.notes: list[str] = []

    def carrier(
        self,
        name: str,
        placement: Placement,
        blobs: Sequence[Blob],
        slabs: Slabs,
        lane: CopyLane | None,
    ) -> Carrier:
        """What brings the streamed units `blobs` of part `name` into its `slabs`.

        Without a `lane` device memory is host memory, and units are read into it whatever the
        placement's source. Masters that cannot be pinned are replaced by a ring, with a note.
        Raises `DeviceError` where that cannot be had either.
        """
        if self._store is None or self._device.type == "meta":
            return NoCarrier()
        readers = [BlobReader(self._store, blob) for blob in blobs]
        if lane is None:
            return FileCarrier(readers, slabs)
        sizes = [blob.nbytes for blob in blobs]
        if placement.source == "pinned":
            masters = self._pinned_masters(name, placement.streamed, sizes, readers, lane)
            if masters is not None:
                return PinnedCarrier(lane, masters, slabs)
        ring = self._ring(name, [placement.slab_bytes] * (len(slabs) + 1), lane)
        return RingCarrier(lane, readers, sizes, ring, slabs)

    def _pinned_masters(
        self,
        name: str,
        streamed: tuple[int, ...],
        sizes: Sequence[int],
        readers: Sequence[BlobReader],
        lane: CopyLane,
    ) -> list[torch.Tensor] | None:
        known, masters = self._masters.get(name, ((), []))
        if known == streamed:
            return masters
        self._masters.pop(name, None)
        wanted, free = pinned_bytes(sizes), host_memory()[1]
        if wanted + HOST_RESERVE > free:
            short = f"{format_size(free)} of host memory are free"
        else:
            try:
                masters = pin(lane, sizes)
            except (RuntimeError, MemoryError) as error:
                short = _first_line(error)
            else:
                for reader, master in zip(readers, masters, strict=True):
                    reader.read(master)
                self._masters[name] = streamed, masters
                return masters
        note = (
            f"{name}: streamed from the file instead of {format_size(wanted)} of pinned host "
            f"memory: {short}"
        )
        if note not in self.notes:
            self.notes.append(note)
        return None

    def _ring(self, name: str, sizes: Sequence[int], lane: CopyLane) -> list[torch.Tensor]:
        try:
            return pin(lane, sizes)
        except (RuntimeError, MemoryError) as error:
            raise DeviceError(
                f"no {format_size(pinned_bytes(sizes))} of pinned host memory could be had to "
                f"stream {name} to {self._device.name} ({_first_line(error)}); free host memory, "
                "raise the container's or user's limit (ulimit -l), or give a larger budget so "
                "that nothing streams"
            ) from error

    def forget(self, name: str) -> None:
        """Give back the masters of a part."""
        self._masters.pop(name, None)

    def close(self) -> None:
        """Give back all host memory."""
        self._masters.clear()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
