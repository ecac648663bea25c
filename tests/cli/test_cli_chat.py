"""`chat`: what a line means, what Ctrl-C does, and where each reply's speech goes."""

from __future__ import annotations

import builtins
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowvram.cli.chat import COMMANDS, numbered
from lowvram.cli.main import main
from lowvram.errors import MediaError

Type = Callable[..., None]


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Type:
    """Lines (or exceptions) that `input` gives in turn, then the end of input. What is written is
    no terminal: a prompt among the words would be read as one of them."""

    def type_in(*lines: Any, terminal: bool = False) -> None:
        left = list(lines)

        def read(prompt: str = "") -> str:
            assert prompt == ""
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr("sys.stdin.isatty", lambda: terminal, raising=False)

    return type_in


def text(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def test_each_line_is_a_turn(engine: Any, keyboard: Type, capsys: Any) -> None:
    keyboard("one", "", "two")
    assert main(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\nHello there\n"
    assert [ask["messages"] for ask in engine.asked] == [text("one"), text("two")]
    assert err.splitlines()[1:] == [
        "speech: lowvram-1.wav (0.20 s)",
        "speech: lowvram-2.wav (0.20 s)",
    ]
    assert sorted(p.name for p in Path().iterdir()) == ["lowvram-1.wav", "lowvram-2.wav"]
    assert engine.closed == 1


def test_the_prompt_of_the_command_is_the_first_turn(engine: Any, keyboard: Type) -> None:
    keyboard("/exit", "never")
    assert main(["chat", "-p", "hi", "--image", "a.png"]) == 0
    assert [ask["messages"] for ask in engine.asked] == [
        [{"type": "image", "image": "a.png"}, *text("hi")]
    ]


def test_media_go_with_the_next_message(engine: Any, keyboard: Type) -> None:
    Path("my clip.mp4").touch()
    keyboard("/video my clip.mp4", "/image https://x.org/a.png", "what?", "and now?")
    assert main(["chat", "--audio", "b.wav", "--no-speech"]) == 0
    assert [ask["messages"] for ask in engine.asked] == [
        [
            {"type": "audio", "audio": "b.wav"},
            {"type": "video", "video": "my clip.mp4"},
            {"type": "image", "image": "https://x.org/a.png"},
            *text("what?"),
        ],
        text("and now?"),
    ]


def test_settings_change_between_turns(engine: Any, keyboard: Type) -> None:
    keyboard("a", "/system Be short.", "/speaker Ethan", "b", "/system", "c", "/usr/bin is what?")
    assert main(["chat", "--top-k", "3"]) == 0
    said = [(ask["system"], ask["speaker"], ask["top_k"]) for ask in engine.asked]
    short = ("Be short.", "Ethan", 3)
    assert said == [(None, None, 3), short, (None, "Ethan", 3), (None, "Ethan", 3)]
    assert engine.asked[-1]["messages"] == text("/usr/bin is what?")


def test_clear_and_save(engine: Any, keyboard: Type) -> None:
    keyboard("a", "/save all.json", "/clear", "/system S", "b", "/save rest.json")
    assert main(["chat"]) == 0
    everything, rest = (json.loads(Path(n).read_text()) for n in ("all.json", "rest.json"))
    reply = {"role": "assistant", "content": "Hello there"}
    assert everything == [{"role": "user", "content": text("a")}, reply]
    assert rest == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": text("b")},
        reply,
    ]


def test_help_and_voices_are_listed(engine: Any, keyboard: Type, capsys: Any) -> None:
    keyboard("/help", "/speaker")
    assert main(["chat"]) == 0
    err = capsys.readouterr().err
    assert all(command in err and meaning in err for command, meaning in COMMANDS.items())
    assert "Chelsie, Ethan\n" in err


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("/jump", 2, "unknown command /jump; /help lists the commands"),
        ("/image", 2, "/image needs a file or an address"),
        ("/image none.png", 1, "there is no file none.png; give another with /image"),
        ("/save", 2, "/save needs the name of a file"),
        ("/save none/x.json", 1, "cannot write none/x.json: No such file or directory"),
        ("/speaker Bob", 2, "unknown voice 'Bob'; known: Chelsie, Ethan"),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_wrong_line_ends_a_script_but_not_a_talk(
    engine: Any, keyboard: Type, capsys: Any, line: str, code: int, message: str, terminal: bool
) -> None:
    keyboard(line, "on", terminal=terminal)
    assert main(["chat"]) == (0 if terminal else code)
    assert f"lowvram-demo: error: {message}\n" in capsys.readouterr().err
    assert len(engine.asked) == (1 if terminal else 0)


def test_a_failed_turn_does_not_end_a_talk(engine: Any, keyboard: Type, capsys: Any) -> None:
    engine.script = [MediaError("a.png is empty")]
    keyboard("a", terminal=True)
    assert main(["chat"]) == 0
    assert "lowvram-demo: error: a.png is empty\n" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_ctrl_c_stops_the_reply_and_twice_leaves(engine: Any, keyboard: Type, capsys: Any) -> None:
    engine.script = ["Hel", KeyboardInterrupt()]
    keyboard("a", "b", KeyboardInterrupt(), "never", terminal=True)
    assert main(["chat", "--no-speech"]) == 130
    out, err = capsys.readouterr()
    assert out == "Hel\nHel\n"
    assert err.count("(Ctrl-C again, Ctrl-D or /exit leaves)") == 2
    assert err.endswith("lowvram-demo: interrupted\n")


@pytest.mark.parametrize("broken", [KeyboardInterrupt(), MediaError("a.png is empty")])
def test_a_first_message_that_comes_to_nothing_does_not_end_a_talk(
    engine: Any, keyboard: Type, broken: BaseException
) -> None:
    engine.script = ["Hel", broken]
    keyboard("/speaker", "/exit", "never", terminal=True)
    assert main(["chat", "-p", "a"]) == 0
    assert len(engine.asked) == 1


def test_two_ctrl_c_at_once_leave(engine: Any, keyboard: Type, capsys: Any) -> None:
    def impatient() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise KeyboardInterrupt

    engine.script = ["Hel", np.zeros(2_400, np.float32), impatient]
    keyboard("a", "never", terminal=True)
    assert main(["chat"]) == 130
    said = "lowvram-demo: interrupted; 0.1 s of speech are in lowvram-1.wav\n"
    assert capsys.readouterr().err.endswith(said)
    assert len(engine.asked) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_termination_ends_a_talk(engine: Any, keyboard: Type, name: str) -> None:
    engine.script = ["Hel", lambda: signal.raise_signal(signal.Signals[name])]
    keyboard("a", "never", terminal=True)
    assert main(["chat"]) == 130
    assert len(engine.asked) == 1


def test_the_prompt_is_not_among_the_words(engine: Any, keyboard: Type, capsys: Any) -> None:
    keyboard("a", terminal=True)
    assert main(["chat", "--no-speech"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n" and err.count("> ") == 2


def test_a_reply_does_not_replace_what_it_answers(engine: Any, keyboard: Type, capsys: Any) -> None:
    Path("lowvram-2.wav").write_bytes(b"mine")
    keyboard("a", "/audio lowvram-2.wav", "b", terminal=True)
    assert main(["chat"]) == 0
    assert "lowvram-2.wav is read by this request" in capsys.readouterr().err
    assert Path("lowvram-2.wav").read_bytes() == b"mine" and len(engine.asked) == 1


def test_ctrl_c_at_the_prompt_warns_first(engine: Any, keyboard: Type) -> None:
    keyboard(KeyboardInterrupt(), "a", terminal=True)
    assert main(["chat", "--no-speech"]) == 0
    assert len(engine.asked) == 1


def test_ctrl_c_ends_a_script(engine: Any, keyboard: Type) -> None:
    engine.script = [KeyboardInterrupt()]
    keyboard("a", "b")
    assert main(["chat"]) == 130
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("lowvram.wav", "lowvram-3.wav"),
        ("some/talk", "some/talk-3"),
        ("folder", "folder/reply-3.wav"),
        ("new/", "new/reply-3.wav"),
        ("/dev/null", "/dev/null"),
    ],
)
def test_replies_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert numbered(output, 3) == expected


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("-", 2, "-o -: a chat writes one file for each reply; name a file or a folder"),
        ("new/", 1, "cannot write new/reply-1.wav: No such file or directory; "),
    ],
)
def test_places_for_speech_are_checked_first(
    engine: Any, capsys: Any, output: str, code: int, message: str
) -> None:
    assert main(["chat", "-o", output]) == code
    assert capsys.readouterr().err.startswith(f"lowvram-demo: error: {message}")
    assert engine.opened == []
