"""The compiled half, called through ctypes (the GIL stays held: it is not a thread of its own)."""

from __future__ import annotations

import ctypes
from pathlib import Path

_TEXT_BYTES = 1 << 17


class Native:
    """The library's few functions, with Python's types."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.PyDLL(str(path))
        self._library.sim_set.argtypes = [ctypes.c_char_p, ctypes.c_double]
        self._library.sim_set.restype = ctypes.c_bool
        self._library.sim_get.argtypes = [ctypes.c_char_p]
        self._library.sim_get.restype = ctypes.c_double

    def call(self, name: str) -> None:
        getattr(self._library, name)()

    def set(self, name: str, value: float) -> None:
        if not self._library.sim_set(name.encode(), value):
            raise KeyError(f"the simulated device has no setting {name!r}")

    def get(self, name: str) -> float:
        value: float = self._library.sim_get(name.encode())
        if value < 0:
            raise KeyError(f"the simulated device has no number {name!r}")
        return value

    def size(self, name: str) -> int:
        return round(self.get(name))

    def lines(self, name: str) -> list[str]:
        out = ctypes.create_string_buffer(_TEXT_BYTES)
        getattr(self._library, name)(out, ctypes.c_int64(_TEXT_BYTES))
        return out.value.decode().splitlines()
