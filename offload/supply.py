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
        known = self._masters.get(name)
        if known is not None and known[0] == streamed:
            return known[1]
        del known  # it holds on to the memory that is given back here
        self.forget(name, lane)
        wanted, free = pinned_bytes(sizes), host_memory()[1]
        if wanted + HOST_RESERVE > free:
            self._no_masters(name, wanted, "more of the host's memory than is free")
            return None
        try:
            masters = pin(lane, sizes)
        except (RuntimeError, MemoryError) as error:
            self._no_masters(name, wanted, first_line(error))
            return None
        for reader, master in zip(readers, masters, strict=True):
            reader.read(master)
        self._masters[name] = streamed, masters
        return masters

    def _no_masters(self, name: str, wanted: int, reason: str) -> None:
        self.note(
            f"{name}: its streamed units are read from the file again and again, since "
            f"{format_size(wanted)} of pinned host memory could not be had ({reason})"
        )

    def note(self, text: str) -> None:
        """Say something about host memory, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _ring(self, name: str, sizes: Sequence[int], lane: CopyLane) -> list[torch.Tensor]:
        try:
            return pin(lane, sizes)
        except (RuntimeError, MemoryError) as error:
            raise DeviceError(
                f"no {format_size(pinned_bytes(sizes))} of pinned host memory could be had to "
                f"stream {name} to {self._device.name} ({first_line(error)}); free host memory, "
                "raise the container's or user's limit (ulimit -l), or give a larger budget so "
                "that nothing streams"
            ) from error

    def forget(self, name: str, lane: CopyLane | None) -> None:
        """Give back the masters of a part."""
        if self._masters.pop(name, None) is not None and lane is not None:
            lane.trim_host()

    def close(self, lane: CopyLane | None) -> None:
        """Give back all host memory."""
        self._masters.clear()
        if lane is not None:
            lane.trim_host()


def first_line(error: BaseException) -> str:
    """What an error says first, for a line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
