"""A test in a process of its own: forked, so that torch is not imported again."""

from __future__ import annotations

import faulthandler
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .build import library
from .device import load

F = TypeVar("F", bound=Callable[..., None])

LONGEST_S = 300
"""A test that hangs ends after this, and tells where every thread of it was."""


def simulated(test: F) -> F:
    """Run the test with the simulated device loaded, without it being loaded for anyone else.

    An assertion that fails there fails here, with its traceback as the message.
    """

    @functools.wraps(test)
    def outside(*args: Any, **kwargs: Any) -> None:
        library()
        sys.stdout.flush()
        sys.stderr.flush()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            _inside(writer, test, args, kwargs)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read().decode(errors="replace")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            raise AssertionError(told or f"the process of the test ended with {code}")

    return outside  # type: ignore[return-value]


def _inside(writer: int, test: F, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Never returns: neither pytest nor exit handlers of the parent run twice."""
    code = 1
    try:
        faulthandler.dump_traceback_later(LONGEST_S, exit=True, file=writer)
        torch.set_num_threads(1)  # threads of the parent's pool are not there
        load()
        test(*args, **kwargs)
        code = 0
    except BaseException:
        os.write(writer, traceback.format_exc().encode()[-60_000:])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
