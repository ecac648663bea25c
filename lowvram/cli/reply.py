"""A reply while it comes: words to the console, sound to its sink."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

from lowvram.cli.output import Console
from lowvram.cli.play import Player
from lowvram.cli.wav import Sink
from lowvram.events import AudioChunk, Event, Finished, Result, TextDelta

if TYPE_CHECKING:
    from lowvram.report import Report


def follow(
    events: Generator[Event, None, None],
    console: Console,
    sink: Sink | None,
    *,
    note: str | None = None,
    player: Player | None = None,
) -> Result:
    """Pass every event on, and return the whole reply; `note` is said as soon as there is one.

    A reply without a sound is a file without samples. When the work fails nothing is left of the
    speech; when it is interrupted, what was spoken so far is kept, as a file that opens.

    Raises:
        KeyboardInterrupt: with a message that says what was kept.
    """
    spoken = 0.0
    result: Result | None = None
    console.waiting("reading the question")
    try:
        with closing(events):
            for event in events:
                if note is not None:
                    console.say(f"note: {note}")
                    note = None
                match event:
                    case TextDelta():
                        console.words(event.text)
                    case AudioChunk():
                        if sink is not None:
                            sink.write(event.samples)
                        if player is not None:
                            player.write(event.samples)
                        seconds = len(event.samples) / event.sample_rate
                        spoken += seconds
                        console.spoken(seconds)
                    case Finished():
                        result = event.result
        console.end_words()
        if sink is not None:
            sink.close()
        if player is not None:
            player.finish()
            if player.problem is not None:
                console.say(f"note: the sound device failed ({player.problem}); not all was heard")
    except KeyboardInterrupt as stopped:
        _abandon(sink, player, keep=spoken > 0)
        console.end_words()
        if sink is None or not spoken:
            raise
        raise type(stopped)(f"{spoken:.1f} s of speech are in {sink.name}") from stopped
    except BaseException:
        _abandon(sink, player, keep=False)
        console.end_words()
        raise
    assert result is not None, "the stream ended without its last event"
    return result


def speech_line(sink: Sink, report: Report) -> str:
    """Where the speech is, how long it is, and whether it had to end."""
    ended = ", cut off there; see --max-speech" if report.speech_cut_off else ""
    return f"speech: {sink.name} ({report.audio_seconds:.2f} s{ended})"


def _abandon(sink: Sink | None, player: Player | None, *, keep: bool) -> None:
    """The file as it stands or as if it had never been, and silence, for which another Ctrl-C
    need not wait."""
    if sink is not None:
        (sink.close if keep else sink.discard)()
    if player is not None:
        player.stop()
