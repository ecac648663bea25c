"""The flags: which there are, where their defaults come from, and what a wrong one says."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from lowvram.cli.arguments import VERBS, build_parser, parse
from lowvram.cli.main import main
from lowvram.conversation import MediaSettings
from lowvram.planner import OPTIONS
from lowvram.settings import GenerationSettings, SamplingSettings

QUESTION = "--prompt --image --audio --video --system --system-prompt"
PLACE = "--model --offline --device --max-memory --dtype --allow"
REPLY = (
    "--speaker --voice --no-speech --max-tokens --max-speech --temperature --top-p --top-k "
    "--seed --solver --whole-speech --pieces --look-ahead"
)
MEDIA = "--fps --max-frames --min-pixels --max-pixels --no-audio-in-video"
REQUEST = f"{QUESTION} {PLACE} {REPLY} {MEDIA} --verbose --help"
FLAGS = {
    "run": f"{REQUEST} --output --report --speech-only --play --json --quiet",
    "chat": f"{REQUEST} --output --report --play --quiet",
    "plan": f"{REQUEST} --json --video-seconds --audio-seconds --images --prompt-tokens",
    "doctor": "--model --offline --json --verbose --help",
    "bench": "--model --device --threads --allow --video-seconds --json --quiet --verbose --help",
}


def actions_of(verb: str) -> list[argparse.Action]:
    actions = build_parser(verb)._actions
    verbs = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
    return list(verbs.choices[verb]._actions)


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_there_and_explained(verb: str, capsys: Any) -> None:
    actions = actions_of(verb)
    long = {name for action in actions for name in action.option_strings if name[:2] == "--"}
    assert long == set(FLAGS[verb].split())
    assert all(action.help and len(action.help) < 90 for action in actions)
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: lowvram-demo {verb} ")
    assert all(flag in out for flag in long)


def test_what_may_be_allowed_is_named(capsys: Any) -> None:
    assert main(["run", "--help"]) == 0
    assert ",".join(OPTIONS) in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-m", "-p", "-o", "-v", "-q"])
def test_short_flags(flag: str) -> None:
    given = {"-m": "folder", "-p": "hi", "-o": "a.wav"}
    args = vars(parse(["run", flag, *([given[flag]] if flag in given else [])]))
    assert {**given, "-v": 1, "-q": True}[flag] in args.values()


def test_defaults_are_those_of_the_settings() -> None:
    args = parse([])
    reply, drawing, media = GenerationSettings(), SamplingSettings(), MediaSettings()
    assert args.verb == "run"
    assert (args.max_tokens, args.max_speech) == (reply.max_new_tokens, reply.max_speech_seconds)
    assert (args.seed, args.solver, args.speaker) == (reply.seed, reply.solver, reply.speaker)
    assert (args.temperature, args.top_p) == (drawing.temperature, drawing.top_p)
    assert args.top_k == drawing.top_k
    assert (args.fps, args.max_frames) == (media.fps, media.max_frames)
    assert (args.min_pixels, args.max_pixels) == (media.min_pixels, media.max_pixels)
    assert args.no_audio_in_video is not media.audio_in_video
    assert (args.model, args.device, args.dtype) == ("pocket", "auto", "auto")


def test_help_of_the_whole_command_names_the_verbs(capsys: Any) -> None:
    assert main(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {text}" in out for verb, text in VERBS.items())


def test_version(capsys: Any) -> None:
    from lowvram import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lowvram-demo {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--imge", "a"], "unrecognized arguments: --imge a (see lowvram-demo run --help)"),
        (["--max-mem", "1GiB"], "unrecognized arguments: --max-mem 1GiB"),
        (["plna"], "unknown verb 'plna'; wanted run, chat, plan, doctor, bench (a prompt"),
        (
            ["run", "-p"],
            "argument -p/--prompt: expected one argument (see lowvram-demo run --help)",
        ),
        (["--device", "tpu"], "argument --device: unknown device 'tpu'; wanted auto, cuda"),
        (["--max-memory", "lots"], "argument --max-memory: 'lots' is not a size; wanted"),
        (["--max-memory", "0"], "argument --max-memory: the size '0' is below one byte"),
        (["--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["--solver", "heun"], "argument --solver: invalid choice: 'heun'"),
        (["--allow", "head8,head2"], "unknown option 'head2' in allow; wanted some of head8"),
        (["--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
        (["--max-tokens", "0"], "max_new_tokens is 0; wanted a whole number, 1 or more"),
        (["--max-speech", "-1"], "max_speech_seconds is -1.0; wanted above 0"),
        (["--temperature", "nan"], "argument --temperature: wanted a finite number, got 'nan'"),
        (["--temperature", "hot"], "argument --temperature: invalid number value: 'hot'"),
        (["--temperature", "-1"], "temperature is -1.0; wanted 0 (greedy) or more"),
        (["--top-p", "2"], "top_p is 2.0; wanted above 0 and at most 1"),
        (["--seed", "-1"], "argument --seed: wanted 0 to 2**62 - 1, got '-1'"),
        (["--fps", "0"], "fps is 0.0; wanted a number above 0"),
        (["--max-frames", "1"], "max_frames is 1; wanted a whole number, 2 or more"),
        (["--min-pixels", "9", "--max-pixels", "8"], "min_pixels is 9 and max_pixels 8; wanted"),
        (["plan", "-q"], "unrecognized arguments: -q"),
        (["run", "hi"], "unrecognized arguments: hi (a prompt goes after -p; see lowvram-demo run"),
        (["doctor", "-p", "hi"], "unrecognized arguments: -p hi (see lowvram-demo doctor --help)"),
        (["doctor", "hi"], "unrecognized arguments: hi (see lowvram-demo doctor --help)"),
        (
            ["bench"],
            "the following arguments are required: {decode,memory} (see lowvram-demo bench",
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(
    argv: list[str], message: str, capsys: Any
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lowvram-demo: error: {message}")
    assert err.count("\n") == 1
