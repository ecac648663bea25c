"""The built-in model's tokenizer: a small byte-level vocabulary in the published file formats.

Bytes first (in the order every byte-level tokenizer uses), then the pieces of a few short words,
then the special tokens of Qwen2.5-Omni in their published order, and last the ids that only the
Talker uses, which have no text in the published files either.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_ROLES = "system user assistant"
_WORDS = (
    "a amber an and apple arc as ash at autumn bay beam bell birch bird blue boat brass bread "
    "bridge brook by cedar chalk cloud clover coal copper coral corn crane creek crow dawn deer "
    "delta down drift dune dusk ember fall fern field fig finch flint foam fog for fox from frost "
    "glass glow gold grain grape grass green grey gull hail harbour hazel heath heron hill hollow "
    "honey ice in into iris iron island ivy jade juniper kelp lake lamp larch lark leaf light lime "
    "linen lotus lunar maple marsh meadow milk mint mist moon moss moth mule near night north oak "
    "ocean of olive on opal orchid otter over owl paper path pearl pebble pine plum pond quartz "
    "rain raven reed ridge river robin rose rust rye sage salt sand sea seed shell silk silver sky "
    "slate slow smoke snow soft song spring star stone storm straw summer swan the thistle thorn "
    "tide to topaz under valley velvet violet warm water wave wheat willow wind winter with wood "
    "wren yarrow"
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
"""Ids 151643 to 151656 of the published tokenizer, in order."""

_MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Ids 151657 to 151664: known to the tokenizer, and not skipped when decoding."""

_TALKER_TOKENS = ("tts_pad", "tts_start", "tts_end", "Ethan", "Chelsie")
"""Names used here for the ids that the tokenizer does not know."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer cuts text before merging (its published tokenizer.json)."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for item in message.content -%}"
    "{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}"
    "{{ '<|vision_bos|><|IMAGE|><|vision_eos|>' }}"
    "{%- elif item.type == 'audio' or 'audio' in item or 'audio_url' in item -%}"
    "{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{%- elif item.type == 'video' or 'video' in item -%}"
    "{{ '<|vision_bos|><|VIDEO|><|vision_eos|>' }}"
    "{%- elif 'text' in item -%}{{ item.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""Writes a conversation as the model card's template does."""


@cache
def byte_letters() -> tuple[str, ...]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return tuple(letters[byte] for byte in range(256))


@cache
def merges() -> tuple[tuple[str, str], ...]:
    """Pairs that join, first to last: each word letter by letter from its front."""
    space = byte_letters()[ord(" ")]
    pairs: dict[tuple[str, str], None] = {}
    for word in [space + word for word in _WORDS.split()] + _ROLES.split():
        for end in range(1, len(word)):
            pairs[word[:end], word[end]] = None
    return tuple(pairs)


@cache
def vocabulary() -> dict[str, int]:
    """Token -> id, without the special ones."""
    tokens = sorted(byte_letters()) + [left + right for left, right in merges()]
    return {token: index for index, token in enumerate(tokens)}


@cache
def special_ids() -> dict[str, int]:
    """The id of every special token, and of the ids only the Talker uses (by the names here)."""
    first = len(vocabulary())
    names = SPECIAL_TOKENS + _MARKUP_TOKENS + _TALKER_TOKENS
    return {name: first + index for index, name in enumerate(names)}


@cache
def word_ids() -> tuple[int, ...]:
    """The ids of whole words, which are what the built-in model says."""
    space = byte_letters()[ord(" ")]
    return tuple(vocabulary()[space + word] for word in _WORDS.split() if len(word) > 1)


@cache
def vocabulary_size() -> int:
    """Rows of the embedding: every id, rounded up to a multiple of 64 as published models do."""
    used = len(vocabulary()) + len(special_ids())
    return -(-used // 64) * 64


def _added_tokens() -> list[dict[str, Any]]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return [
        {"id": special_ids()[text], "content": text, **flags, "special": text in SPECIAL_TOKENS}
        for text in SPECIAL_TOKENS + _MARKUP_TOKENS
    ]


def tokenizer_json() -> dict[str, Any]:
    """The contents of `tokenizer.json`, in the layout of Qwen2's."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": _SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary(),
            "merges": [f"{left} {right}" for left, right in merges()],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    named = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in _added_tokens()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": named,
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2_5OmniProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        **named,
    }


def preprocessor_config() -> dict[str, Any]:
    """The contents of `preprocessor_config.json`: the published values."""
    return {
        "chunk_length": 300,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "hop_length": 160,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 12845056,
        "merge_size": 2,
        "min_pixels": 3136,
        "n_fft": 400,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "padding_side": "right",
        "padding_value": 0.0,
        "patch_size": 14,
        "processor_class": "Qwen2_5OmniProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
        "temporal_patch_size": 2,
    }
