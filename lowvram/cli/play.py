"""Speech to the sound device while it comes; where there is none the reply goes on in silence."""

from __future__ import annotations

from importlib import import_module
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from lowvram.cli.output import Console, one_line
from lowvram.events import SAMPLE_RATE

if TYPE_CHECKING:
    import numpy as np

SLICE = SAMPLE_RATE // 10
"""Samples that are handed to the device at once: how soon `stop` is heard."""


class Player:
    """One reply's sound. `write` does not wait for the device, `finish` waits for the last sample,
    `stop` falls silent at once. A device that fails is silent from then on; `problem` says why."""

    def __init__(self, stream: Any) -> None:
        self.problem: str | None = None
        self._stream = stream
        self._pieces: SimpleQueue[np.ndarray | None] = SimpleQueue()
        self._silent = False
        self._thread = Thread(target=self._play, daemon=True)
        self._thread.start()

    def write(self, samples: np.ndarray) -> None:
        for start in range(0, len(samples), SLICE):
            self._pieces.put(samples[start : start + SLICE])

    def finish(self) -> None:
        self._pieces.put(None)
        self._thread.join()

    def stop(self) -> None:
        self._silent = True
        self.finish()

    def _play(self) -> None:
        """Every piece in turn; the device takes one when it has room for it."""
        try:
            with self._stream:
                while (piece := self._pieces.get()) is not None:
                    if not self._silent:
                        self._stream.write(piece.reshape(-1, 1))
        except Exception as error:  # PortAudioError is known only where the package is
            self.problem = one_line(error)


def open_player(console: Console) -> Player | None:
    """The default sound device; None where it cannot be had, which is said in one line."""
    try:
        stream = import_module("sounddevice").OutputStream(SAMPLE_RATE, channels=1, dtype="float32")
    except ModuleNotFoundError:
        console.say("note: --play needs sounddevice (pip install lowvram-omni[play]); no sound")
        return None
    except Exception as error:  # no PortAudio library (OSError), or no device (PortAudioError)
        console.say(f"note: --play finds no sound device ({one_line(error)}); no sound")
        return None
    return Player(stream)
