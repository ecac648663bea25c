"""What the command prints: the answer on stdout, everything else on stderr, bars on a terminal."""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from lowvram.cli.arguments import PROGRAM
from lowvram.cli.process import leave

STDOUT, STDERR = "standard output", "standard error"
"""What messages call them."""


class Console:
    """One command's streams.

    `text` is where the reply's words go (None keeps them in). With `quiet` nothing but errors goes
    to stderr; `verbose` lets `detail` through.
    """

    def __init__(self, *, text: TextIO | None, quiet: bool = False, verbose: int = 0) -> None:
        self._text = text
        self.quiet = quiet
        self.verbose = verbose
        self._line_open = False
        self._spoke = False
        self._bar: Any = None

    @classmethod
    def for_flags(cls, args: Namespace) -> Console:
        """Words go to stdout, unless that is taken by --json or by `-o -`."""
        flags = vars(args)
        quiet = bool(flags.get("quiet"))
        text: TextIO | None = sys.stdout
        if flags.get("json"):
            text = None
        elif flags.get("output") == "-":
            text = None if quiet else sys.stderr
        return cls(text=text, quiet=quiet, verbose=flags.get("verbose", 0))

    def say(self, line: object) -> None:
        """A line for the person who waits."""
        if not self.quiet:
            self._clear()
            tell(line)

    def detail(self, text: object) -> None:
        """What only -v shows."""
        if self.verbose:
            self.say(text)

    def words(self, piece: str) -> None:
        """The next piece of the reply, as it comes."""
        self._stop_bar()
        if self._text is not None and piece:
            self._line_open = False  # a stream that fails now is not written to again
            write_text(self._text, piece)
            self._line_open = not piece.endswith("\n")

    def end_words(self) -> None:
        """The reply ends with a line end, wherever it is written."""
        self._stop_bar()
        line_open, self._line_open, self._spoke = self._line_open, False, False
        if self._text is not None and line_open:
            write_text(self._text, "\n")

    def waiting(self, what: str) -> None:
        """Say what is going on until the first words; on a terminal only."""
        self._clear()
        self._start_bar(f"{what} ...")

    def spoken(self, seconds: float) -> None:
        """Move the bar of speech on.

        The first speech ends the line of words on a terminal; should words come after it, they
        have the line for themselves and there is no bar.
        """
        if not self._spoke:
            self._clear()
            self._spoke = True
        if self._bar is None and not self._half_a_line:
            self._start_bar("speech {n:.1f} s in {elapsed}")
        if self._bar is not None:
            self._bar.update(seconds)

    @property
    def _half_a_line(self) -> bool:
        return self._line_open and self._text is not None and self._text.isatty()

    def _start_bar(self, layout: str) -> None:
        if self.quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        self._bar = tqdm(bar_format=layout, file=sys.stderr, leave=False)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _clear(self) -> None:
        """Make room for a line: no bar, and no half line of words on the same terminal."""
        self._stop_bar()
        if self._half_a_line and self._text is not None:
            self._line_open = False
            write_text(self._text, "\n")


def fail(message: object, program: str = PROGRAM) -> None:
    """The one line of a failure."""
    tell(f"{program}: error: {one_line(message)}")


def tell(line: object) -> None:
    """A line on stderr; that nobody reads them is no reason to end the work."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        leave(sys.stderr)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def print_json(value: Mapping[str, Any] | list[dict[str, Any]]) -> None:
    """One value on stdout; bytes and seconds are numbers."""
    write_text(sys.stdout, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(stream: TextIO, text: str) -> None:
    """The text, at once; an error says which stream it was."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        name = STDERR if stream is sys.stderr else STDOUT
        raise OSError(error.errno, error.strerror, name) from error


@contextmanager
def library_output(console: Console, *, everything: bool) -> Iterator[None]:
    """Warnings become one line each.

    Those that are addressed to programmers (deprecations) show only with `everything`.
    """

    def show(message: Warning | str, category: type[Warning], *where: object) -> None:
        if everything or issubclass(category, UserWarning):
            console.say(f"note: {one_line(message)}")

    if console.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # what the hub's client reads
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        finally:
            console.end_words()
