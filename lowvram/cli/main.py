"""`lowvram-demo`: one verb for each intent, one line for each failure.

Exit codes: 0 done; 1 a file, checkpoint, medium or output path that fails; 2 something wrong with
the arguments; 3 the request does not fit the memory; 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module

from lowvram.cli.arguments import PROGRAM, parse
from lowvram.cli.output import STDOUT, Console, fail, library_output, tell
from lowvram.cli.process import fill_standard_streams, ignore_interrupts, leave, termination
from lowvram.errors import LowVRAMError

INTERRUPTED = 130

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that takes no more; an interpreter that flushes to it at exit fails again."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line, that of the process by default, and return its exit code."""
    return run_program(PROGRAM, argv, parse, lambda args, console: _verb(args.verb)(args, console))


def run_program(
    name: str,
    argv: list[str] | None,
    read: Callable[[list[str]], Namespace],
    work: Callable[[Namespace, Console], int],
) -> int:
    """A whole program: without `argv` it is the process's own, which ends with it."""
    if argv is not None:
        return command(name, lambda: read(argv), work)
    try:
        return command(name, lambda: read(sys.argv[1:]), work)
    finally:
        ignore_interrupts()


def command(
    program: str, read: Callable[[], Namespace], work: Callable[[Namespace, Console], int]
) -> int:
    """Read flags and do the work; every failure is one line and an exit code."""
    verbose = 0
    fill_standard_streams()
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            args = read()
        except SystemExit:  # --help and --version
            sys.stdout.flush()
            raise
        verbose = args.verbose
        console = Console.for_flags(args)
        with library_output(console, everything=verbose > 1), termination():
            code = work(args, console)
            sys.stdout.flush()
            return code
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except KeyboardInterrupt as stopped:
        tell(f"{program}: interrupted{_detail(stopped)}")
        return INTERRUPTED
    except BrokenPipeError as error:
        if error.filename in (None, STDOUT):
            leave(sys.stdout)
        fail(f"{error.filename or STDOUT} was closed before the reply was complete", program)
        return 1
    except Exception as error:
        return _failed(error, verbose, program)


def _verb(name: str) -> Callable[[Namespace, Console], int]:
    """The function of a verb; its module is imported only when it is asked for."""
    function: Callable[[Namespace, Console], int] = import_module(f"lowvram.cli.{name}").main
    return function


def _failed(error: Exception, verbose: int, program: str) -> int:
    if isinstance(error, LowVRAMError):
        fail(error, program)
        return error.exit_code
    if isinstance(error, ModuleNotFoundError):
        line = f"the package {error.name} is not installed; {PROGRAM} doctor says how to get it"
        fail(line, program)
        return 1
    if isinstance(error, OSError) and error.strerror:
        if error.errno in FULL:
            leave(sys.stdout)
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        fail(line, program)
        return 1
    if verbose > 1:
        traceback.print_exception(error)
    fail(f"unexpected {type(error).__name__}: {error} (-vv shows where it came from)", program)
    return 1


def _detail(stopped: KeyboardInterrupt) -> str:
    return f"; {stopped}" if str(stopped) else ""


if __name__ == "__main__":
    sys.exit(main())
