"""A model by folder, hub id or built-in name: found, opened and checked, nothing loaded.

The one place that knows which files a checkpoint has and what they say. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowvram import hub, pocket
from lowvram.config import OmniConfig, QuantConfig
from lowvram.errors import CheckpointError, UsageError
from lowvram.offload import Store
from lowvram.specs import POCKET, SPECS, find_spec
from lowvram.tensors import (
    EMBED_NAME,
    SPEECH_PARTS,
    Shape,
    expected_tensors,
    is_packed,
    packed_linears,
    part_of,
    thinker_linears,
)
from lowvram.voices import VoiceInfo, read_voice_infos, read_voices

if TYPE_CHECKING:
    from lowvram.conversation import Tokenizer
    from lowvram.engine.voice import Voice

TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types that weights may be stored in: safetensors names -> torch names."""

MAX_CODES = 4096
"""Codes of a reply where the checkpoint sets no bound: `talker_max_new_tokens` of
`Qwen2_5OmniForConditionalGeneration.generate` in transformers."""


@dataclass(frozen=True)
class Difference:
    """One thing in which the files differ from what `config.json` asks for."""

    kind: Literal["missing", "unexpected", "shape", "type", "voices"]
    name: str
    seen: str = ""
    wanted: str = ""

    @property
    def harmful(self) -> bool:
        """Whether the model cannot run like this; what is only too much does no harm."""
        return self.kind != "unexpected"

    def __str__(self) -> str:
        detail = f": {self.seen}" if self.seen else ""
        wanted = f", wanted {self.wanted}" if self.wanted else ""
        return f"{self.kind} {self.name}{detail}{wanted}"


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint says about how a reply ends.

    `eos_token_ids` end the text; `codec_end_ids` end the speech, which has `max_codes` codes at
    most; `max_new_tokens` bounds the text where the checkpoint does.
    """

    eos_token_ids: tuple[int, ...]
    codec_end_ids: tuple[int, ...]
    max_codes: int = MAX_CODES
    max_new_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose headers were read. `name` is what the user called it.

    `raw` is its `config.json` and `config` what that means. Whoever opened it closes `store`.
    """

    name: str
    folder: Path
    raw: Mapping[str, Any]
    config: OmniConfig
    store: Store

    @cached_property
    def _packed(self) -> frozenset[str]:
        return packed_linears(self.store.names())

    def quantized(self, linear: str) -> bool:
        """Whether a linear (`thinker.model.layers.0.mlp.up_proj`) is packed in the file."""
        return linear in self._packed

    @cached_property
    def stored_dtype(self) -> str:
        """The type of the weights that are not packed: bfloat16, float16 or float32."""
        if not self.store.has(EMBED_NAME):
            return self.config.dtype
        return TYPES.get(self.store.info(EMBED_NAME).dtype, self.config.dtype)

    @cached_property
    def _expected(self) -> dict[str, Shape]:
        return expected_tensors(self.config, self.quantized)

    @property
    def packed(self) -> bool:
        """Whether linears of the text model are packed."""
        return bool(self._packed)

    @property
    def voices(self) -> tuple[str, ...]:
        """The names of the voices, in the file's order; none where the model does not speak.

        Raises:
            CheckpointError: `spk_dict.pt` is missing or damaged.
        """
        return tuple(voice.name for voice in self._voice_infos)

    @property
    def voice_frames(self) -> int:
        """Mel frames of the longest reference recording; 0 where the model does not speak."""
        return max((voice.frames for voice in self._voice_infos), default=0)

    @cached_property
    def _voice_infos(self) -> tuple[VoiceInfo, ...]:
        if not self.config.speaks or self.config.dit is None:
            return ()
        return tuple(read_voice_infos(self._voice_file, self.config.dit))

    @property
    def _voice_file(self) -> Path:
        return self.folder / "spk_dict.pt"

    def check_speaker(self, name: str | None) -> str:
        """The voice of that name; the checkpoint's first for None.

        Raises:
            UsageError: there is none of that name, or the model does not speak.
            CheckpointError: `spk_dict.pt` is missing or damaged.
        """
        if not self.voices:
            raise UsageError(f"{self.name} does not speak; turn speech off")
        if name is None:
            return self.voices[0]
        if name not in self.voices:
            raise UsageError(f"unknown voice {name!r}; wanted one of {', '.join(self.voices)}")
        return name

    def load_voices(self) -> dict[str, Voice]:
        """Every voice with its tensors, on the CPU.

        Raises:
            CheckpointError: `spk_dict.pt` is missing or damaged.
        """
        from lowvram.engine.voice import Voice

        if self.config.dit is None:
            return {}
        entries = read_voices(self._voice_file, self.config.dit)
        return {name: Voice.from_entry(name, entry) for name, entry in entries.items()}

    @cached_property
    def generation(self) -> GenerationDefaults:
        """How replies end.

        The ids that end the text are the Thinker's own, which is where transformers takes them
        from; else those of `generation_config.json`; else the tokenizer's `<|im_end|>`.
        """
        saved = _read_json(self.folder / "generation_config.json", optional=True)
        thinker = self.raw.get("thinker_config") or {}
        text = thinker.get("text_config") or {}
        places = (thinker, text, saved)
        found = (place["eos_token_id"] for place in places if place.get("eos_token_id") is not None)
        eos = next(found, None)
        if eos is None:
            eos = self.tokenizer().special["<|im_end|>"]
        talker = self.config.talker
        return GenerationDefaults(
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (int(eos),),
            codec_end_ids=(talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id)
            if talker
            else (),
            max_codes=_count(saved, "talker_max_new_tokens") or MAX_CODES,
            max_new_tokens=_count(saved, "thinker_max_new_tokens"),
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template; read once."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from lowvram.conversation import Tokenizer

        return Tokenizer.from_folder(self.folder)

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """What `preprocessor_config.json` says; empty where there is none."""
        return _read_json(self.folder / "preprocessor_config.json", optional=True)

    def check(self, speech: bool = True) -> list[Difference]:
        """Every difference between the headers and what `config.json` asks for.

        Without `speech`, nothing is said about Talker, vocoder and voices.
        """
        wanted = _without_speech(self._expected) if not speech else self._expected
        found = list(_differences(wanted, self.store))
        known = set(self._expected)
        for name in self.store.names():
            if name not in known and (speech or not name.startswith(SPEECH_PARTS)):
                found.append(Difference("unexpected", name))
        if speech and self.config.speaks:
            try:
                _ = self.voices
            except CheckpointError as error:
                found.append(Difference("voices", "spk_dict.pt", str(error)))
        return found

    def verify(self, speech: bool = True) -> None:
        """As `check`, for use before work begins.

        Raises:
            CheckpointError: the first difference that would stop the work, and how many there are.
        """
        harmful = [difference for difference in self.check(speech) if difference.harmful]
        if harmful:
            more = f" (and {len(harmful) - 1} more)" if len(harmful) > 1 else ""
            raise CheckpointError(
                f"{self.folder} does not hold the model its config.json describes: {harmful[0]}"
                f"{more}; `lowvram-demo doctor -m {self.folder}` lists all: download it again"
            )


def resolve(model: str | Path, *, offline: bool = False) -> Checkpoint:
    """Find a model, and open it without loading anything.

    Args:
        model: `pocket`; the folder of a checkpoint; the name of a known checkpoint
            (`Qwen2.5-Omni-7B-AWQ`) or any hub id (`owner/model`), which is downloaded once.
        offline: take hub checkpoints from the cache only.

    Raises:
        CheckpointError: nothing is found, or what is found cannot be read.
    """
    folder = _find(model, offline)
    raw, config = read_config(folder / "config.json")
    store = Store.open(folder)
    held = {name.partition(".")[0] for name in store.names()}
    if not held.issuperset(SPEECH_PARTS):
        config = replace(config, talker=None, dit=None, bigvgan=None)
    checkpoint = Checkpoint(str(model), folder, raw, config, store)
    try:
        _check_packing(checkpoint)
    except CheckpointError:
        store.close()
        raise
    return checkpoint


def read_config(file: Path) -> tuple[dict[str, Any], OmniConfig]:
    """A `config.json`, and what it means together with an old `quant_config.json` beside it.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
    """
    raw = _read_json(file)
    try:
        config = OmniConfig.from_dict(raw)
        old = file.with_name("quant_config.json")
        if config.quant is None and old.exists():
            config = replace(config, quant=QuantConfig.from_dict(_read_json(old)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be understood ({error}); download it again"
        ) from error
    return raw, config


def _find(model: str | Path, offline: bool) -> Path:
    if model == POCKET:
        return pocket.ensure()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is no checkpoint: it has no config.json; wanted the folder of a "
                "Qwen2.5-Omni checkpoint"
            )
        return folder
    name = str(model)
    spec = find_spec(name)
    if spec is not None and spec.hub_id is None:
        raise CheckpointError(
            f"nobody publishes {spec.name}; give the folder of one that was made, or try "
            "Qwen2.5-Omni-7B-AWQ or Qwen2.5-Omni-3B"
        )
    if spec is not None and spec.hub_id is not None:
        return hub.download(spec.hub_id, offline=offline)
    if isinstance(model, str) and hub.is_hub_id(name) and not folder.exists():
        return hub.download(name, offline=offline)
    known = ", ".join([POCKET, *(spec.name for spec in SPECS.values() if spec.hub_id)])
    what = "is a file" if folder.exists() else "is no folder, nor a known model"
    raise CheckpointError(
        f"{name} {what}; wanted the folder of a checkpoint, a hub id "
        f"(owner/model), or one of {known}"
    )


def _check_packing(checkpoint: Checkpoint) -> None:
    linears = thinker_linears(checkpoint.config.thinker)
    packed = [name for name in linears if checkpoint.quantized(name)]
    if packed and checkpoint.config.quant is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds 4-bit weights ({packed[0]}.qweight), but its config.json "
            "has no quantization_config that says how they are packed: take config.json from the "
            "same checkpoint"
        )


def _without_speech(tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in tensors.items() if part_of(name) not in SPEECH_PARTS}


def _differences(wanted: Mapping[str, Shape], store: Store) -> Iterator[Difference]:
    for name, shape in wanted.items():
        if not store.has(name):
            yield Difference("missing", name, wanted=str(list(shape)))
            continue
        info = store.info(name)
        if info.shape != shape:
            yield Difference("shape", name, str(list(info.shape)), str(list(shape)))
        if info.dtype not in _types(name):
            yield Difference("type", name, info.dtype, " or ".join(_types(name)))


def _types(name: str) -> tuple[str, ...]:
    """The types a tensor may be stored in."""
    if is_packed(name):
        return ("I32",)
    return ("F16", "BF16") if name.endswith(".scales") else tuple(TYPES)


def _count(place: Mapping[str, Any], key: str) -> int | None:
    value = place.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return content
