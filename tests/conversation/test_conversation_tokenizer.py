"""Text to ids and back, whole and as it streams; chat templates that mean no good."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conversation_files import prepared, user, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from lowvram.conversation import Tokenizer
from lowvram.errors import CheckpointError, UsageError
from lowvram.pocket_vocabulary import special_ids, tokenizer_json, vocabulary

WORDS = "Größe — 你好, 👍🏽! e\u0301 \u00ad\ttab\n\n  spaces  <|im_end|> ünïcödé"


def core(folder: Path) -> Any:
    """The library's own tokenizer, as a reference."""
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_text_survives_the_way_there_and_back(tokenizer: Tokenizer) -> None:
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(WORDS)) == unicodedata.normalize("NFC", WORDS)


def test_special_tokens_in_text_are_plain_text(
    tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    ids = tokenizer.encode("a<|im_end|>b")
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == "a<|im_end|>b"
    assert tokenizer.special["<|im_end|>"] in core(tokenizer_folder).encode("a<|im_end|>b").ids


@given(st.lists(st.integers(0, len(vocabulary()) + 40), max_size=60))
def test_decoding_is_that_of_the_library(ids: list[int]) -> None:
    tokenizer, theirs = _shared()
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, len(vocabulary()) + 40), max_size=60))
def test_a_stream_gives_whole_characters_and_the_same_in_sum(ids: list[int]) -> None:
    """Random ids are mostly broken UTF-8, which is what a model of noise says."""
    tokenizer, _ = _shared()
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@given(st.text(max_size=40))
def test_a_stream_of_true_text_never_shows_half_a_character(text: str) -> None:
    tokenizer, _ = _shared()
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert stream.finish() == ""


def test_a_character_of_several_tokens_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👍")
    assert len(ids) == 4
    stream = tokenizer.stream()
    assert [stream.push(index) for index in ids] == ["", "", "", "👍"]
    cut = tokenizer.stream()
    assert [cut.push(index) for index in ids[:3]] == ["", "", ""]
    assert cut.finish() == "\ufffd"


def test_ids_without_a_token_say_nothing(tokenizer: Tokenizer) -> None:
    """A model's last layer is wider than its vocabulary."""
    beyond = max(special_ids().values()) + 1000
    assert tokenizer.decode([*tokenizer.encode("a"), beyond, special_ids()["<|im_end|>"]]) == "a"
    assert tokenizer.decode([special_ids()["<tool_call>"]]) == "<tool_call>"


def _shared(cache: dict[str, Any] = {}) -> tuple[Tokenizer, Any]:  # noqa: B006
    import tempfile

    if not cache:
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder))
            cache["ours"], cache["theirs"] = Tokenizer.from_folder(folder), core(Path(folder))
    return cache["ours"], cache["theirs"]


def with_template(folder: Path, template: str) -> Tokenizer:
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.from_folder(folder)


TURNS = [{"role": "user", "content": "hi"}]


@pytest.mark.oracle
def test_the_rendered_template_is_that_of_transformers(
    tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    messages: Sequence[dict[str, Any]] = [
        {"role": "system", "content": " be  brief "},
        {
            "role": "user",
            "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "a"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {
            "role": "user",
            "content": [{"type": "audio", "audio": "x"}, {"type": "video", "video": "y"}],
        },
    ]
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == wanted


def test_where_a_chat_template_is_found(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(TURNS) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(TURNS) == "from jinja"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "named"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("chat_template.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(TURNS) == "named"
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no chat template"):
        Tokenizer.from_folder(tmp_path)


def test_templates_have_what_transformers_gives_them(tmp_path: Path) -> None:
    source = (
        "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n{{ eos_token }}{% continue %}"
        "{% endif %}\n{%- endfor %}{{ {'a': 'é'} | tojson }}{{ strftime_now('%Y')[:2] }}"
    )
    assert with_template(tmp_path, source).apply_chat_template(TURNS) == '<|im_end|>{"a": "é"}20'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('touch FILE') }}",
        "{% set _ = messages.append(1) %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'FILE' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.x.y }}",
        "{% if %}",
    ],
)
def test_a_malicious_template_runs_nothing(source: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    tokenizer = with_template(tmp_path, source.replace("FILE", str(made)))
    with pytest.raises(CheckpointError, match="chat template") as caught:
        tokenizer.apply_chat_template(TURNS)
    assert not made.exists()
    assert "\n" not in str(caught.value)


def test_a_template_may_refuse_a_conversation(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="refuses the conversation: roles must alternate"):
        tokenizer.apply_chat_template(TURNS)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ messages[0].content[0].text }}", "fewer places for images"),
        ("{{ '<|IMAGE|><|IMAGE|>' }}", "more places for images"),
    ],
)
def test_a_template_that_loses_media_is_refused(source: str, said: str, tmp_path: Path) -> None:
    from conversation_files import picture

    tokenizer = with_template(tmp_path, source)
    asked = user({"type": "text", "text": "x"}, {"type": "image", "image": picture(30, 30)})
    with pytest.raises(CheckpointError, match=said):
        prepared(asked, tokenizer)


def test_texts_that_look_like_the_marks_in_use(tokenizer: Tokenizer) -> None:
    odd = "\ue0000\ue001 \ue0001\ue001 \ue00099\ue001 \\1 \\g<0>"
    prompt, _ = prepared(user(odd, "second"), tokenizer)
    assert odd + "second" in tokenizer.decode(prompt.ids)


@pytest.mark.oracle
def test_without_tokenizer_json_transformers_builds_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_tokenizer(tmp_path)
    model = tokenizer_json()["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]))
    built = Tokenizer.from_folder(tmp_path)
    assert built.encode(WORDS) == tokenizer.encode(WORDS)
    assert built.special == tokenizer.special
    assert built.apply_chat_template(TURNS) == tokenizer.apply_chat_template(TURNS)


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("tokenizer.json", None, "neither tokenizer.json nor vocab.json"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
    ],
)
def test_damaged_tokenizer_files(
    name: str, contents: str | None, said: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    if contents is not None:
        (tmp_path / name).write_text(contents)
    with pytest.raises(CheckpointError, match=said) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    changed = tokenizer_json() | {"decoder": {"type": "Fuse"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="not byte-level"):
        Tokenizer.from_folder(tmp_path)


def test_measuring_needs_neither_torch_nor_transformers(tokenizer_folder: Path) -> None:
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from conversation_files import *\n"
        f"tokenizer = Tokenizer.from_folder({str(tokenizer_folder)!r})\n"
        "prepared(user('hi', {'type': 'image', 'image': picture(30, 40)}), tokenizer)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
