"""`lowvram-demo run`: one request, its text on stdout as it comes, its speech in a WAV file."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from lowvram.cli.arguments import POCKET
from lowvram.cli.output import Console, print_json
from lowvram.cli.play import open_player
from lowvram.cli.reply import follow, speech_line
from lowvram.cli.request import GREETING, Request, places, read_request
from lowvram.cli.wav import Sink, open_sink
from lowvram.errors import DoesNotFitError, UsageError
from lowvram.report import check_report_path, write_report

if TYPE_CHECKING:
    from lowvram.events import Result
    from lowvram.planner import Plan

OUTPUT = "lowvram.wav"
"""Where speech goes without -o."""


def main(args: Namespace, console: Console) -> int:
    request = read_request(args).asking(GREETING if args.model == POCKET else None)
    sink = _sink(args, request)
    if args.report:
        check_report_path(args.report)
    asked = request.speech
    request = request.suited_to(request.find_checkpoint())
    if asked and not request.speech:
        if request.options["say"] is not None:
            raise UsageError(f"--speech-only: {args.model} does not speak; use one that does")
        if args.output is not None:
            raise UsageError(f"-o {args.output}: {args.model} does not speak; leave -o out")
        console.say(f"note: {args.model} does not speak: text only")
        sink = None
    try:
        plan, result = _answer(request, console, sink, play=args.play and request.speech)
    except DoesNotFitError as error:
        if args.json:
            print_json(_summary(error.plan, None, None) | {"fits": False, "error": str(error)})
        raise
    if args.json:
        print_json(_summary(plan, result, None if sink is None else sink.name))
    _tell(result, sink, console)
    if args.report:
        write_report(result.report, args.report)
        console.say(f"report: {args.report}")
    return 0


def _sink(args: Namespace, request: Request) -> Sink | None:
    """Where the speech will go; whether it can go there is found out now, before the work."""
    if args.no_speech:
        if args.output is not None:
            raise UsageError(f"-o {args.output} and --no-speech exclude each other")
        return None
    if args.output == "-":
        if args.json:
            raise UsageError("-o - and --json both want standard output; name a file for -o")
        if sys.stdout.isatty():
            raise UsageError("-o -: standard output is a terminal; send it to a file or a player")
    return open_sink(OUTPUT if args.output is None else args.output, places(request.content))


def _answer(
    request: Request, console: Console, sink: Sink | None, *, play: bool
) -> tuple[Plan, Result]:
    console.waiting(f"opening {request.model}")
    with request.open_model() as omni:
        plan = omni.plan(request.conversation, **request.options)
        console.detail(f"{plan}\n")
        events = omni.stream(request.conversation, **request.options)
        player = open_player(console) if play else None
        return plan, follow(events, console, sink, note=request.note, player=player)


def _summary(plan: Any, result: Result | None, path: str | None) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "text": result.text if result else None,
        "audio_path": path,
        "audio_seconds": result.report.audio_seconds if result else None,
        "fits": plan.fits if plan else False,
        "plan": plan.to_json() if plan else None,
        "report": result.report.to_json() if result else None,
    }


def _tell(result: Result, sink: Sink | None, console: Console) -> None:
    """The timings, and where the speech is."""
    report = result.report
    if sink is not None:
        console.say(speech_line(sink, report))
    marks = {
        "first text": report.first_text_s,
        "first audio": report.first_audio_s,
        "total": report.total_s,
    }
    times = "; ".join(f"{name} {at:.2f} s" for name, at in marks.items() if at is not None)
    console.say(f"\n{report}" if console.verbose else times)
