"""`lowvram-demo chat`: several turns. On a terminal it prompts; from a pipe each line is a turn."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.output import Console, fail
from lowvram.cli.play import open_player
from lowvram.cli.process import Terminated
from lowvram.cli.reply import follow, speech_line
from lowvram.cli.request import MEDIA, Part, Request, media_part, places, read_request, text_part
from lowvram.cli.run import OUTPUT
from lowvram.cli.wav import open_sink
from lowvram.errors import LowVRAMError, UsageError
from lowvram.options import Options
from lowvram.report import check_report_path, write_report

if TYPE_CHECKING:
    from lowvram.omni import LowVRAMOmni

COMMANDS = {
    "/image FILE": "show a picture with the next message",
    "/audio FILE": "play a recording with the next message",
    "/video FILE": "show a video with the next message",
    "/system TEXT": "set the system prompt; without TEXT, the usual one",
    "/speaker NAME": "change the voice; without NAME, list them",
    "/clear": "forget the conversation",
    "/save FILE": "write the conversation as JSON",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops a reply, twice leaves",
}


def main(args: Namespace, console: Console) -> int:
    request = read_request(args)
    if args.output == "-":
        raise UsageError("-o -: a chat writes one file for each reply; name a file or a folder")
    if request.speech:
        open_sink(numbered(args.output or OUTPUT, 1), places(request.content))
    if args.report:
        check_report_path(args.report)
    request = request.suited_to(request.find_checkpoint())
    console.waiting(f"opening {request.model}")
    with request.open_model() as omni:
        if request.note is not None:
            console.say(f"note: {request.note}")
        session = Session(
            request, omni, args.output or OUTPUT, console, args.report, play=args.play
        )
        first = [part["text"] for part in request.content if part["type"] == "text"]
        session.loop(*first)
    return 0


class Session:
    """A conversation at the keyboard: what was attached, what was set, how many turns so far."""

    def __init__(
        self,
        request: Request,
        omni: LowVRAMOmni,
        output: str,
        console: Console,
        report: str | None = None,
        *,
        play: bool = False,
    ) -> None:
        self._omni = omni
        self._chat = omni.chat()
        self._options: Options = {**request.options}
        self._speaks = request.speech
        self._plays = play and request.speech
        self._attached: list[Part] = [p for p in request.content if p["type"] in MEDIA]
        self._output = output
        self._report = report
        self._console = console
        self._turns = 0

    def loop(self, *first: str) -> None:
        """Turns until the input ends, after those messages. On a terminal an error ends the turn,
        else the command.

        Raises:
            KeyboardInterrupt: a second Ctrl-C in a row, any without a terminal, or a termination.
        """
        terminal = sys.stdin.isatty()
        if terminal:
            with suppress(ImportError):
                import_module("readline")  # with which `input` edits lines and recalls them
        waiting, stopped = list(first), False
        while True:
            try:
                if waiting:
                    self.send(waiting.pop(0))
                    continue
                line = _read_line("> " if terminal else "")
                if line is None or line == "/exit":
                    return
                stopped = False
                self.take(line)
            except Terminated:
                raise
            except KeyboardInterrupt as interrupt:
                if stopped or not terminal or _presses(interrupt) > 1:
                    raise
                stopped = True
                kept = f"{interrupt}; " if str(interrupt) else ""
                self._console.say(f"\n({kept}Ctrl-C again, Ctrl-D or /exit leaves)")
            except LowVRAMError as error:
                if not terminal:
                    raise
                fail(error)

    def take(self, line: str) -> None:
        """One line: a command, or a message."""
        word, _, rest = line.partition(" ")
        if not re.fullmatch(r"/[a-z]+", word):
            if line:
                self.send(line)
            return
        rest = rest.strip()
        match word[1:]:
            case "image" | "audio" | "video" as kind:
                self._attach(kind, rest)
            case "system":
                self._options["system"] = rest or None
            case "speaker":
                self._change_voice(rest)
            case "clear":
                self._chat.messages.clear()
                self._attached.clear()
            case "save":
                self._save(rest)
            case "help":
                width = max(map(len, COMMANDS))
                for command, text in COMMANDS.items():
                    self._console.say(f"{command:{width}}  {text}")
            case _:
                raise UsageError(f"unknown command {word}; /help lists the commands")

    def send(self, text: str) -> None:
        """One turn: the message with what was attached, then the reply."""
        content = [*self._attached, text_part(text)]
        self._attached = []
        self._turns += 1
        sink = None
        if self._speaks:
            sink = open_sink(numbered(self._output, self._turns), places(content))
        player = open_player(self._console) if self._plays else None
        self._plays = player is not None
        events = self._chat.stream(content, **self._options)
        result = follow(events, self._console, sink, player=player)
        if sink is not None:
            self._console.say(speech_line(sink, result.report))
        if self._report is not None:
            name = numbered(self._report, self._turns)
            write_report(result.report, name)
            self._console.say(f"report: {name}")
        self._console.detail(result.report)

    def _attach(self, kind: str, place: str) -> None:
        if not place:
            raise UsageError(f"/{kind} needs a file or an address")
        if "://" not in place and not place.startswith("data:") and not Path(place).is_file():
            raise LowVRAMError(f"there is no file {place}; give another with /{kind}")
        self._attached.append(media_part(kind, place))

    def _change_voice(self, name: str) -> None:
        if name:
            self._options["speaker"] = self._omni.checkpoint.check_speaker(name)
        else:
            self._console.say(", ".join(self._omni.speakers) or "no voices are loaded")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs the name of a file")
        system = self._options["system"]
        first = [{"role": "system", "content": system}] if system else []
        text = json.dumps([*first, *self._chat.messages], indent=2, ensure_ascii=False)
        try:
            Path(name).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LowVRAMError(f"cannot write {name}: {error.strerror}") from error


def numbered(output: str, reply: int) -> str:
    """The file of one reply: `reply-1.wav` in a folder, `name-1.wav` for `name.wav`."""
    path = Path(output)
    if output.endswith("/") or path.is_dir():
        return str(path / f"reply-{reply}.wav")
    if path.exists() and not path.is_file():
        return output
    return str(path.with_stem(f"{path.stem}-{reply}"))


def _presses(error: BaseException | None) -> int:
    """How often Ctrl-C was pressed while the first was borne; what `follow` words anew has a
    cause."""
    count = 0
    while error is not None:
        count += isinstance(error, KeyboardInterrupt) and error.__cause__ is None
        error = error.__context__
    return count


def _read_line(prompt: str) -> str | None:
    """The next line without the blanks around it, or None at the end."""
    if not sys.stdout.isatty():  # where `input` would put it among the words
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise LowVRAMError(f"standard input is not UTF-8 text ({error.reason})") from error
