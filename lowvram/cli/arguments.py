"""The flags of every verb, in plain words. Defaults are read from the settings dataclasses."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lowvram.cli.values import (
    blocks_of,
    count_of,
    device_of,
    names_of,
    number_of,
    seed_of,
    size_of,
)
from lowvram.errors import UsageError
from lowvram.settings import SOLVERS, GenerationSettings, SamplingSettings

PROGRAM = "lowvram-demo"
VERBS = {
    "run": "answer one request (what a command line without a verb does)",
    "chat": "talk over several turns",
    "plan": "say what a request would need, and whether it fits; loads nothing",
    "doctor": "look at devices, packages, memory and a checkpoint",
    "bench": "measure this machine at a model's true shapes, on random weights",
}
POCKET = "pocket"
DTYPES = ("auto", "bfloat16", "float16", "float32")


class Parser(argparse.ArgumentParser):
    """Raises instead of printing and leaving, so that every error is the same one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of one command line; `run` is the default verb.

    Raises:
        UsageError: an unknown verb or flag, or a value of the wrong kind.
        SystemExit: after --help and --version, with code 0.
    """
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["run", *argv]
    if argv[0] not in VERBS and not argv[0].startswith("-"):
        raise UsageError(
            f"unknown verb {argv[0]!r}; wanted {', '.join(VERBS)} (a prompt goes after -p)"
        )
    args, unknown = build_parser(argv[0]).parse_known_args(argv)
    if unknown:
        hint = f"see {PROGRAM} {args.verb} --help"
        if not unknown[0].startswith("-") and "prompt" in args:
            hint = f"a prompt goes after -p; {hint}"
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)} ({hint})")
    return args


def build_parser(verb: str) -> Parser:
    """The command with all its verbs and the flags of one.

    What other verbs' flags would import is left alone: `doctor` must run where it is missing.
    """
    parser = Parser(
        prog=PROGRAM,
        description="Qwen2.5-Omni on a device with little memory: text, images, sound and video "
        "in; text and speech out.",
        epilog=f"Without a verb, {PROGRAM} runs one request: {PROGRAM} run --help shows its flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", required=True)
    for name, text in VERBS.items():
        one = verbs.add_parser(name, help=text, description=_sentence(text), allow_abbrev=False)
        if name == verb:
            _add_flags(one, name)
    return parser


def _add_flags(parser: argparse.ArgumentParser, verb: str) -> None:
    if verb == "doctor":
        _add_model(parser)
    elif verb == "bench":
        _add_bench(parser)
    else:
        _add_question(parser)
        _add_place(parser)
        _add_reply(parser)
        _add_media(parser)
    if verb == "plan":
        _add_lengths(parser)
    if verb == "run":
        _add_output(
            parser,
            "where the speech goes; - is stdout, with text on stderr (default: lowvram.wav)",
        )
    if verb == "chat":
        _add_output(parser, "a folder, or a .wav name to number (default: lowvram.wav)")
    if verb == "run":
        parser.add_argument(
            "--speech-only",
            metavar="TEXT",
            help="speak this text and make no other; - reads it from stdin",
        )
    if verb in ("run", "chat"):
        parser.add_argument("--play", action="store_true", help="play the speech as it comes")
    if verb != "chat":
        kind = "a JSON list" if verb == "bench" else "one JSON object"
        parser.add_argument("--json", action="store_true", help=f"{kind} on stdout")
    if verb in ("run", "chat", "bench"):
        parser.add_argument("-q", "--quiet", action="store_true", help="no notes, no progress")
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="more detail; -vv also shows where an unexpected error came from",
    )


def _add_model(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "-m",
        "--model",
        default=POCKET,
        metavar="MODEL",
        help=f"a folder, a hub id or a built-in name (default: {POCKET}, which speaks noise)",
    )
    parser.add_argument(
        "--offline", action="store_true", help="take hub models from the cache only"
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("decode", "memory"),
        metavar="{decode,memory}",
        help="speed of decoding here, or memory anywhere",
    )
    parser.add_argument(
        "-m",
        "--model",
        default=POCKET,
        metavar="MODEL",
        help=f"whose shapes: a built-in name, or a folder with config.json (default: {POCKET})",
    )
    parser.add_argument(
        "--device", type=device_of, default="auto", help="decode: cpu; memory needs none"
    )
    parser.add_argument(
        "--video-seconds",
        type=count_of,
        nargs="+",
        default=(15, 30, 60),
        metavar="N",
        help="memory: seconds of video that are asked about (default: 15 30 60)",
    )
    parser.add_argument(
        "--threads", type=count_of, metavar="N", help="threads to compute with (default: torch's)"
    )
    parser.add_argument(
        "--allow",
        type=names_of,
        default=("head4",),
        metavar="LIST",
        help="decode: how the head may be rounded: head4, head8 (default: head4)",
    )


def _add_question(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the question")
    group.add_argument("-p", "--prompt", metavar="TEXT", help="what to say; - reads it from stdin")
    for kind, what in (("image", "a picture"), ("audio", "a recording"), ("video", "a video")):
        group.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            metavar="FILE",
            help=f"{what}: a path or an address; may be repeated",
        )
    group.add_argument("--system", "--system-prompt", metavar="TEXT", help="the system prompt")


def _add_place(parser: argparse.ArgumentParser) -> None:
    from lowvram.planner import OPTIONS

    group = parser.add_argument_group("the model, and where it runs")
    _add_model(group)
    group.add_argument(
        "--device",
        type=device_of,
        default="auto",
        help="auto, cpu, cuda[:N], npu[:N] or meta (default: auto)",
    )
    group.add_argument(
        "--max-memory",
        type=size_of,
        metavar="SIZE",
        help="the most device memory to use, as in 8GiB (default: what is free)",
    )
    group.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="the compute type (default: auto)"
    )
    group.add_argument(
        "--allow",
        type=names_of,
        default=(),
        metavar="LIST",
        help=f"savings that may change results: {','.join(OPTIONS)} (default: none)",
    )


def _add_reply(parser: argparse.ArgumentParser) -> None:
    reply, drawing = GenerationSettings(), SamplingSettings()
    group = parser.add_argument_group("the reply")
    group.add_argument(
        "--speaker", "--voice", metavar="NAME", help="the voice (default: the model's first)"
    )
    group.add_argument("--no-speech", action="store_true", help="text only; no voice is loaded")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=reply.max_new_tokens,
        metavar="N",
        help="the most tokens of text (default: the model's own limit)",
    )
    group.add_argument(
        "--max-speech",
        type=number_of,
        default=reply.max_speech_seconds,
        metavar="SECONDS",
        help="the most speech (default: the model's own limit)",
    )
    group.add_argument(
        "--temperature",
        type=number_of,
        default=drawing.temperature,
        metavar="X",
        help="how freely words are drawn; 0 takes the likeliest (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=number_of,
        default=drawing.top_p,
        metavar="X",
        help="draw from the likeliest tokens that make up this share (default: %(default)s, off)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=drawing.top_k,
        metavar="N",
        help="draw from the N likeliest tokens (default: %(default)s, off)",
    )
    group.add_argument(
        "--seed",
        type=seed_of,
        default=reply.seed,
        metavar="N",
        help="the same seed gives the same words and the same sound (default: %(default)s)",
    )
    group.add_argument(
        "--solver",
        choices=SOLVERS,
        default=reply.solver,
        help="how sound is integrated; rk4 is 4 times slower (default: %(default)s)",
    )
    group.add_argument(
        "--whole-speech",
        action="store_true",
        help="sound as if vocoded at once, for files: it begins two seconds of speech later",
    )
    pieces = ",".join(map(str, reply.pieces))
    group.add_argument(
        "--pieces",
        type=blocks_of,
        default=reply.pieces,
        metavar="LIST",
        help=f"blocks of 0.24 s in the pieces of speech, the last again and again ({pieces})",
    )
    group.add_argument(
        "--look-ahead",
        type=int,
        default=reply.look_ahead,
        metavar="N",
        help="blocks that a piece hears of what follows it (default: %(default)s)",
    )


def _add_media(parser: argparse.ArgumentParser) -> None:
    from lowvram.conversation import MediaSettings

    media = MediaSettings()
    group = parser.add_argument_group("pictures and video")
    group.add_argument(
        "--fps",
        type=number_of,
        default=media.fps,
        metavar="X",
        help="frames taken from each second of video (default: %(default)s)",
    )
    group.add_argument(
        "--max-frames",
        type=int,
        default=media.max_frames,
        metavar="N",
        help="the most frames taken from a video (default: %(default)s)",
    )
    for end, verb in (("min", "enlarged"), ("max", "shrunk")):
        group.add_argument(
            f"--{end}-pixels",
            type=int,
            metavar="N",
            help=f"pictures and frames are {verb} to this many pixels (default: the model's)",
        )
    group.add_argument(
        "--no-audio-in-video", action="store_true", help="leave the sound of a video out"
    )


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("lengths, in place of a question and its media")
    for kind in ("video", "audio"):
        group.add_argument(
            f"--{kind}-seconds",
            type=number_of,
            metavar="S",
            help=f"as if there were {kind} of that length"
            + (" with sound: 781 tokens a second" if kind == "video" else ": 25 tokens a second"),
        )
    group.add_argument(
        "--images", type=int, metavar="N", help="as if there were N pictures of 756 tokens"
    )
    group.add_argument("--prompt-tokens", type=int, metavar="N", help="as if the text had N tokens")


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help=text)
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write memory over time there: a picture (.png), a page (.html) or numbers (.json)",
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def version() -> str:
    from lowvram import __version__

    return __version__
