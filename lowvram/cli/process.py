"""What a command asks of its process: standard streams that are there, and signals that end it."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

ENDING = tuple(
    number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)
"""Signals that end the work; the second, of a terminal that goes away, is not known everywhere."""


class Terminated(KeyboardInterrupt):
    """The process was told to end. Unlike Ctrl-C, this is never about a single reply."""


@contextmanager
def termination() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, so that nothing half-written stays behind.

    Where one of them is ignored, as by `nohup`, it stays so.
    """

    def stop(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    taken = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupts() -> None:
    """For the interpreter's own end, in which another Ctrl-C would stop nothing but that."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def fill_standard_streams() -> None:
    """A stream that the process was started without (`>&-`) becomes one that goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (as long as the process)


def leave(stream: TextIO) -> None:
    """Its reader has left, or its disk is full: the interpreter must not flush to it at exit."""
    with suppress(io.UnsupportedOperation):  # a stream in memory
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
