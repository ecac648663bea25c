"""Has the system read a part's bytes from the disk before they are asked for.

They come into the system's own cache: no memory of this process, and dropped when it is needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

from .header import TensorInfo
from .host import host_memory

STEP = 128 << 10
"""Bytes asked for at a time: Linux cuts a longer request down to a disk's read-ahead, which is
this or more."""


class ReadAhead:
    """Reads one part ahead at a time, on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self, infos: Iterable[TensorInfo]) -> None:
        """Read these tensors ahead, instead of any others still under way.

        At most what half of the free memory holds, so that nothing in use is pushed out. Where the
        system takes no such advice nothing is done, and errors are left to the reading itself.
        """
        self.end()
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = sorted(infos, key=lambda info: (str(info.file), info.offset))
        most = host_memory()[1] // 2
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_advise, args=(wanted, most, self._stop), name="read ahead", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """Stop; what was read stays where the system put it."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None


def _advise(infos: list[TensorInfo], most: int, stop: threading.Event) -> None:
    left = most
    for info in infos:
        try:
            # A descriptor of its own: the store's may be closed meanwhile.
            file = os.open(info.file, os.O_RDONLY)
        except OSError:
            return
        try:
            for start in range(0, info.nbytes, STEP):
                if stop.is_set() or left <= 0:
                    return
                size = min(STEP, info.nbytes - start)
                os.posix_fadvise(file, info.offset + start, size, os.POSIX_FADV_WILLNEED)
                left -= size
        except OSError:
            return
        finally:
            os.close(file)
