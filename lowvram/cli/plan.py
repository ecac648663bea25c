"""`lowvram-demo plan`: what a request would need. Reads headers only, without torch."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.output import Console, print_json
from lowvram.cli.request import GREETING, Request, read_request
from lowvram.errors import DoesNotFitError, UsageError
from lowvram.options import with_system
from lowvram.specs import POCKET, find_spec

if TYPE_CHECKING:
    from lowvram.conversation import MediaSettings, PromptShape
    from lowvram.planner import ModelFacts, Plan

LENGTHS = ("video_seconds", "audio_seconds", "images", "prompt_tokens")
"""Flags that stand in for real media and text."""


def main(args: Namespace, console: Console) -> int:
    plan = make_plan(args)
    if args.json:
        print_json(plan.to_json())
    else:
        print(plan)
    if not plan.fits:
        raise DoesNotFitError(plan.refusal, plan)
    return 0


def make_plan(args: Namespace) -> Plan:
    """The plan for the flags, from the checkpoint's and the media's headers; or from a
    `config.json` or a built-in name, and from lengths.

    Raises:
        UsageError, CheckpointError, MediaError: as their messages say.
    """
    from lowvram.planner import plan_request

    request = read_request(args)
    alone = find_config(request)
    if alone is None:
        model, shape, request = _of_checkpoint(request, args)
    else:
        model = alone
        request = request.speaking(model.config.speaks)
        shape = _shape_without_checkpoint(request, args, model)
    return plan_request(
        model,
        shape,
        request.settings()[0],
        device=request.device if alone is None else _device(request.device),
        dtype=request.dtype,
        max_memory=request.max_memory,
        allow=request.allow,
    )


def find_config(request: Request) -> ModelFacts | None:
    """The model, where nothing but its `config.json` is to be read: a built-in name, such a file,
    a folder without weights, or a hub id; None for a checkpoint.

    Raises:
        CheckpointError: the file cannot be read or had.
    """
    from lowvram import hub
    from lowvram.checkpoint import read_config
    from lowvram.planner import config_facts

    name = request.model
    if name == POCKET:
        return None
    path = Path(name).expanduser()
    if path.is_file():
        return config_facts(name, read_config(path)[1])
    if path.is_dir():
        file = path / "config.json"
        if any(path.glob("*.safetensors*")) or not file.is_file():
            return None
        return config_facts(name, read_config(file)[1])
    if spec := find_spec(name):
        return config_facts(spec.name, spec.config)
    if hub.is_hub_id(name) and not path.exists():
        folder = hub.download(name, offline=request.offline, files=hub.CONFIG_FILES)
        return config_facts(name, read_config(folder / "config.json")[1])
    return None


def _of_checkpoint(request: Request, args: Namespace) -> tuple[ModelFacts, PromptShape, Request]:
    from lowvram.conversation import measure
    from lowvram.planner import model_facts

    checkpoint = request.find_checkpoint()
    request = request.suited_to(checkpoint)
    generation, media = request.settings()
    model = model_facts(checkpoint, speech=generation.speech)
    if _lengths(args):
        return model, _imagined(request, args, model, media), request
    asked = request.asking(GREETING)
    shape = measure(
        with_system(asked.conversation, asked.options["system"]),
        tokenizer=checkpoint.tokenizer(),
        config=checkpoint.config.thinker,
        settings=media,
        speech=generation.speech,
        preprocessor=checkpoint.preprocessor,
    )
    return model, shape, request


def _shape_without_checkpoint(request: Request, args: Namespace, model: ModelFacts) -> PromptShape:
    from lowvram.conversation import measure_without_tokenizer

    generation, media = request.settings()
    if _lengths(args):
        return _imagined(request, args, model, media)
    asked = request.asking(GREETING)
    return measure_without_tokenizer(
        with_system(asked.conversation, asked.options["system"]),
        config=model.config.thinker,
        settings=media,
        speech=generation.speech,
    )


def _imagined(
    request: Request, args: Namespace, model: ModelFacts, media: MediaSettings
) -> PromptShape:
    """The prompt that the lengths describe."""
    from lowvram.conversation import imagined_media, shape_of

    if request.content:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in _lengths(args))
        raise UsageError(f"{flags} in place of real text and media; leave out one or the other")
    tokens = args.prompt_tokens or 0
    if args.prompt_tokens is not None and tokens < 1:
        raise UsageError(f"--prompt-tokens is {tokens}; wanted 1 or more")
    config = model.config.thinker
    shapes = imagined_media(
        config,
        media,
        video_seconds=args.video_seconds,
        audio_seconds=args.audio_seconds,
        images=args.images or 0,
    )
    shape = shape_of(shapes, tokens, config)
    if not shape.tokens:
        raise UsageError("a prompt without tokens; wanted a longer one")
    return shape


def _lengths(args: Namespace) -> list[str]:
    return [name for name in LENGTHS if getattr(args, name) is not None]


def _device(name: str) -> str:
    """A model without weights need not run on this machine: the accelerator here, or else cuda."""
    from lowvram.offload import default_device

    if name != "auto":
        return name
    found = default_device()
    return "cuda" if found == "cpu" else found
