"""What to give up, rung by rung, when the device runs out of memory inside a plan.

Something else may have taken memory since the plan was made. First half the chunk, twice; then
modules that only wait for a later request; then one more unit of the part at hand is streamed.
Each rung changes no token. Below the last one the error goes on to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from lowvram.offload import clear_frames, format_size, out_of_memory

if TYPE_CHECKING:
    from lowvram.engine.context import Context

T = TypeVar("T")

HALVINGS = 2


class Ladder:
    """The rungs for one part of one request."""

    def __init__(self, context: Context, part: str, chunk: int = 1) -> None:
        self._context, self._part = context, part
        self._chunk, self._least = chunk, max(1, chunk >> HALVINGS)

    def in_chunks(self, total: int, work: Callable[[int, int], None]) -> None:
        """Call `work(start, stop)` over 0 to `total`, with smaller steps where memory runs out.

        `work` may be called again with the same start after it failed.
        """
        start = 0
        while start < total:
            stop = min(start + self._chunk, total)
            try:
                work(start, stop)
            except Exception as error:
                if not out_of_memory(error) or self._chunk <= self._least:
                    raise
                self._let_go(error)
                self._chunk //= 2
                self._context.note(f"{self._part}: chunks of {self._chunk} tokens")
            else:
                start = stop

    def climb(self, work: Callable[[], T], again: Callable[[], None] = lambda: None) -> T:
        """`work()` with the part loaded; where memory runs out, `again()` and `work()` anew with
        more room."""
        failed = False
        while True:
            try:
                self._context.load(self._part)
                if failed:
                    again()
                return work()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._let_go(error)
                if not (self._evict() or self._stream_more()):
                    raise
                failed = True

    def _let_go(self, error: Exception) -> None:
        """The frames below would keep what they had allocated alive."""
        clear_frames(error)
        self._context.device.empty_cache()

    def _evict(self) -> bool:
        """Drop what no phase under way uses."""
        idle = self._context.idle()
        for name in idle:
            self._context.loader.drop(name)
        if idle:
            self._context.note(f"{', '.join(idle)}: dropped to make room for {self._part}")
        return bool(idle)

    def _stream_more(self) -> bool:
        """Have as many units of the part streamed as free at least one unit's bytes."""
        wider = self._context.stream_more(self._part)
        if wider is None:
            return False
        self._context.note(
            f"{self._part}: {len(wider.streamed)} units streamed through {wider.slabs} slabs of "
            f"{format_size(wider.slab_bytes)}"
        )
        return True
