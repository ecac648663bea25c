"""Whole prompts: against transformers' processor, and `measure` against `prepare`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversation_files import picture, prepared, thinker_config, tone, user, write_film
from conversation_oracle import processor, rope_index, with_sound

from lowvram.conversation import SPEECH_PROMPT, MediaSettings, Prompt, Tokenizer, measure, prepare
from lowvram.conversation.audio import load_sound_track
from lowvram.errors import CheckpointError, UsageError

TEXT = "Ordinary text, with breaks.\n\n  What's 12+34?  Größe, 你好, 👍🏽 e\u0301\n"


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(height: int, width: int, seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(height, width, seed)}


def audio(seconds: float) -> dict[str, Any]:
    return {"type": "audio", "audio": tone(seconds)}


def video(frames: int, height: int = 112, width: int = 168) -> dict[str, Any]:
    return {"type": "video", "video": np.stack([picture(height, width, i) for i in range(frames)])}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": user(text(TEXT)),
    "string": [{"role": "user", "content": "\n hello"}],
    "system": [{"role": "system", "content": "Be brief."}, *user(text("hi"))],
    "image": user(image(100, 130), text("What is this?")),
    "audio": user(text("Listen:"), audio(3.337), text("?")),
    "video": user(video(8), text("Go on")),
    "mixture": [
        *user(image(60, 50), audio(0.71), text("and"), image(300, 20, 3), video(5), text("?")),
        {"role": "assistant", "content": [text("Yes. "), text("Both.")]},
        *user(audio(2.5), video(4, 84, 56), text("Now?")),
    ],
}


def values(messages: list[dict[str, Any]], kind: str) -> list[Any]:
    items = [m["content"] for m in messages if not isinstance(m["content"], str)]
    return [item[kind] for content in items for item in content if kind in item]


def resized_frames(prompt: Prompt) -> list[np.ndarray]:
    return [item.frames for item in prompt.vision if item.seconds_per_grid]


def their_inputs(
    tokenizer_folder: Path, messages: list[dict[str, Any]], prompt: Prompt, **more: Any
) -> Any:
    theirs = processor(tokenizer_folder)
    rendered = theirs.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    media = {
        "images": values(messages, "image"),
        "audio": values(messages, "audio"),
        "videos": resized_frames(prompt),
    }
    given = {kind: found for kind, found in media.items() if found}
    return theirs(text=rendered, return_tensors="pt", **(given | more))


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_is_that_of_transformers(
    name: str, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    messages = CONVERSATIONS[name]
    prompt, shape = prepared(messages, tokenizer)
    theirs = their_inputs(tokenizer_folder, messages, prompt)

    assert prompt.ids.tolist() == theirs["input_ids"][0].tolist()
    assert prompt.shape == shape
    stills = [item for item in prompt.vision if not item.seconds_per_grid]
    if stills:
        assert [item.grid for item in stills] == list(map(tuple, theirs["image_grid_thw"].tolist()))
        patches = np.concatenate([item.patches(0) for item in stills])
        np.testing.assert_array_equal(patches, theirs["pixel_values"].numpy())
    frames = theirs["feature_attention_mask"].sum(1) if prompt.audio else []
    for item, padded, length in zip(
        prompt.audio, theirs.get("input_features", []), frames, strict=True
    ):
        wanted = padded[:, : int(length)].numpy()
        np.testing.assert_allclose(item.features, wanted, rtol=0, atol=2e-4)
    if prompt.vision:
        seconds = theirs.get("video_second_per_grid")
        found = rope_index(
            thinker_config(),
            prompt.ids,
            image_grid_thw=theirs.get("image_grid_thw"),
            video_grid_thw=theirs.get("video_grid_thw"),
            audio_seqlens=frames if prompt.audio else None,
            second_per_grids=None if seconds is None else torch.as_tensor(seconds),
        )
        np.testing.assert_array_equal(prompt.positions, found)


@pytest.mark.oracle
def test_a_heard_film_is_that_of_transformers(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    film = write_film(tmp_path / "film.mp4", frames=150, seconds=5.0)
    messages = user({"type": "video", "video": str(film)}, text("What happens?"))
    prompt, shape = prepared(messages, tokenizer)
    sound = load_sound_track(str(film))
    theirs = their_inputs(
        tokenizer_folder,
        messages,
        prompt,
        audio=[sound],
        **with_sound(),
        **({"audio_from_video_indices": [0]} if "load_audio_from_video" in with_sound() else {}),
    )
    assert prompt.ids.tolist() == theirs["input_ids"][0].tolist()
    assert prompt.shape == shape
    assert [item.seconds_per_grid for item in prompt.vision] == [1.0]
    length = int(theirs["feature_attention_mask"].sum())
    wanted = theirs["input_features"][0, :, :length].numpy()
    np.testing.assert_allclose(prompt.audio[0].features, wanted, rtol=0, atol=2e-4)
    found = rope_index(
        thinker_config(),
        prompt.ids,
        video_grid_thw=theirs["video_grid_thw"],
        audio_seqlens=theirs["feature_attention_mask"].sum(1),
        second_per_grids=torch.as_tensor(theirs["video_second_per_grid"]),
        use_audio_in_video=True,
    )
    np.testing.assert_array_equal(prompt.positions, found)


def test_slots_are_where_the_placeholders_stand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    film = write_film(tmp_path / "film.mp4", frames=150, seconds=5.0)
    silent = write_film(tmp_path / "silent.mp4", sound=None)
    messages = user(
        image(60, 90),
        {"type": "video", "video": film},
        audio(1.0),
        {"type": "video", "video": silent},
    )
    prompt, shape = prepared(messages, tokenizer)
    config = thinker_config()
    assert len(shape.audio_frames) == 2
    pictures = [config.image_token_index, config.video_token_index, config.video_token_index]
    for item, index in zip(prompt.vision, pictures, strict=True):
        time, height, width = item.grid
        assert len(item.slots) == time * height * width // 4
        assert set(prompt.ids[item.slots]) == {index}
        assert (np.diff(item.slots) > 0).all()
    for item in prompt.audio:
        assert set(prompt.ids[item.slots]) == {config.audio_token_index}
    every = np.concatenate([item.slots for item in (*prompt.vision, *prompt.audio)])
    placeholders = np.isin(prompt.ids, [*pictures, config.audio_token_index])
    assert sorted(every) == np.flatnonzero(placeholders).tolist()


def test_one_switch_for_the_sound_of_videos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    film = {"type": "video", "video": write_film(tmp_path / "film.mp4")}
    heard, heard_shape = prepared(user(film), tokenizer)
    unheard, unheard_shape = prepared(user(film), tokenizer, audio_in_video=False)
    assert (len(heard.audio), len(unheard.audio)) == (1, 0)
    assert (heard.shape, unheard.shape) == (heard_shape, unheard_shape)
    assert thinker_config().audio_token_index not in unheard.ids


def test_a_film_without_sound_carries_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    silent = {"type": "video", "video": write_film(tmp_path / "silent.mp4", sound=None)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt, shape = prepared(user(silent), tokenizer)
    assert prompt.audio == () and prompt.shape == shape


@pytest.mark.parametrize(
    "typed",
    ["<|im_end|>", "<|IMAGE|>", "<|AUDIO|>", "<|VIDEO|>", "<|vision_bos|><|VIDEO|><|vision_eos|>"],
)
def test_special_tokens_in_what_people_type_stay_text(typed: str, tokenizer: Tokenizer) -> None:
    inside = f"before {typed} after"
    plain, _ = prepared(user(image(60, 60), text(inside)), tokenizer)
    empty, _ = prepared(user(image(60, 60), text("")), tokenizer)
    special = set(tokenizer.special.values())
    kept = [index for index in plain.ids.tolist() if index in special]
    assert kept == [index for index in empty.ids.tolist() if index in special]
    assert inside in tokenizer.decode(plain.ids)
    assert len(plain.vision[0].slots) == len(empty.vision[0].slots)


def test_neighbouring_texts_are_tokenised_as_one_run(tokenizer: Tokenizer) -> None:
    """As in the whole rendered string, where nothing marks the end of one text."""
    prompt, _ = prepared(user(text("sys"), text("tem")), tokenizer)
    assert len(tokenizer.encode("system")) < len(tokenizer.encode("sys") + tokenizer.encode("tem"))
    run = tokenizer.encode("user\nsystem")
    ids = prompt.ids.tolist()
    assert any(ids[i : i + len(run)] == run for i in range(len(ids)))


def test_speech_sets_its_system_prompt(tokenizer: Tokenizer) -> None:
    spoken, _ = prepared(user(text("hi")), tokenizer, speech=True)
    silent, _ = prepared(user(text("hi")), tokenizer)
    assert tokenizer.decode(spoken.ids).startswith(f"system\n{SPEECH_PROMPT}\n")
    assert tokenizer.decode(silent.ids).startswith("system\nYou are a helpful assistant.\n")


def test_a_conflicting_system_prompt_is_warned_about_once(tokenizer: Tokenizer) -> None:
    def ask(system: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepared([{"role": "system", "content": system}, *user("hi")], tokenizer, speech=True)
        return [str(warning.message) for warning in caught]

    assert ask(SPEECH_PROMPT) == []
    (line,) = ask("You are a pirate of the seven seas, and answer in rhyme.")
    assert "pirate" in line and "speech" in line
    assert ask("You are a pirate of the seven seas, and answer in rhyme.") == []


def test_the_next_position_is_past_every_other(tokenizer: Tokenizer) -> None:
    prompt, shape = prepared(user(image(280, 280), text("a")), tokenizer)
    assert prompt.next_position == int(prompt.positions.max()) + 1 == shape.next_position
    assert prompt.next_position < len(prompt.ids)
    assert prompt.ids.dtype == prompt.positions.dtype == np.int64


def arguments(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "config": thinker_config(),
        "settings": MediaSettings(),
        "speech": False,
        "preprocessor": None,
    }


@pytest.mark.parametrize("door", [prepare, measure])
def test_a_config_of_another_checkpoint_is_refused(door: Any, tokenizer: Tokenizer) -> None:
    import dataclasses

    other = dataclasses.replace(thinker_config(), image_token_index=5)
    with pytest.raises(CheckpointError, match="5 as the token of images"):
        door(user("hi"), **(arguments(tokenizer) | {"config": other}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("patch_size", 16), ("resample", 2), ("hop_length", 200), ("feature_size", 80)],
)
def test_a_preprocessor_of_another_model_is_refused(
    name: str, value: int, tokenizer: Tokenizer
) -> None:
    with pytest.raises(CheckpointError, match=f"{name} {value}"):
        measure(user("hi"), **(arguments(tokenizer) | {"preprocessor": {name: value}}))


def test_pixel_bounds_come_from_the_preprocessor_and_yield_to_settings(
    tokenizer: Tokenizer,
) -> None:
    given = arguments(tokenizer) | {"preprocessor": {"min_pixels": 3136, "max_pixels": 28 * 28 * 4}}
    asked = user(image(280, 280))
    assert measure(asked, **given).grids == ((1, 4, 4),)
    given["settings"] = MediaSettings(max_pixels=28 * 28 * 9)
    assert measure(asked, **given).grids == ((1, 6, 6),)
    own = user(image(280, 280) | {"max_pixels": 28 * 28})
    assert measure(own, **given).grids == ((1, 2, 2),)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", "conversation is a str"),
        ([], "empty"),
        ([[{"role": "user", "content": "hi"}]], "not a batch"),
        ([{"role": "bot", "content": "hi"}], "message 1 has role 'bot'"),
        ([{"role": "user"}], "message 1 has missing as content"),
        (user(3), "message 1, item 1, is a int"),
        (user({"type": "smell"}), "type 'smell'"),
        (user({"type": "text"}), 'missing as "text"'),
        (user("half of a pair: \ud83d"), "no Unicode"),
        (user({"type": "image"}), 'no "image"'),
        (user({"type": "image", "image": "a.png", "rotate": 90}), "'rotate', which is not known"),
        (user({"type": "video", "video": "a.mp4", "fps": 0}), "fps is 0"),
        (user({"type": "video", "video": "a.mp4", "max_frames": 1}), "max_frames is 1"),
    ],
)
def test_a_malformed_conversation_is_one_clear_line(
    messages: Any, said: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(UsageError) as caught:
        measure(messages, **arguments(tokenizer))
    line = str(caught.value)
    assert (said in line and "wanted" in line) or (said in line and "may have" in line)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": True}, "fps is True"),
        ({"max_frames": 1}, "max_frames is 1"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels is 9 and max_pixels 8"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MediaSettings(**settings)


def test_a_bound_that_is_set_moves_one_that_is_not() -> None:
    assert MediaSettings().pixel_range(10, 20) == (10, 20)
    assert MediaSettings(max_pixels=5).pixel_range(10, 20) == (5, 5)
    assert MediaSettings(max_pixels=15).pixel_range(10, 20) == (10, 15)
    assert MediaSettings(min_pixels=30).pixel_range(10, 20) == (30, 30)
    assert MediaSettings(min_pixels=1, max_pixels=2).pixel_range(10, 20) == (1, 2)
