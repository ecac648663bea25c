"""`lowvram-demo plan`: what a request would need. Reads headers only, without torch."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from lowvram.cli.output import Console, print_json
from lowvram.cli.request import GREETING, Request, read_request
from lowvram.errors import DoesNotFitError
from lowvram.options import with_system

if TYPE_CHECKING:
    from lowvram.planner import Plan


def main(args: Namespace, console: Console) -> int:
    plan = make_plan(read_request(args).asking(GREETING))
    if args.json:
        print_json(plan.to_json())
    else:
        print(plan)
    if not plan.fits:
        raise DoesNotFitError(plan.refusal, plan)
    return 0


def make_plan(request: Request) -> Plan:
    """The plan for a request, from the checkpoint's and the media's headers.

    Raises:
        UsageError, DeviceError, CheckpointError, MediaError: as their messages say.
    """
    from lowvram.conversation import measure
    from lowvram.planner import model_facts, plan_request

    checkpoint = request.find_checkpoint()
    request = request.suited_to(checkpoint)
    generation, media = request.settings()
    shape = measure(
        with_system(request.conversation, request.options["system"]),
        tokenizer=checkpoint.tokenizer(),
        config=checkpoint.config.thinker,
        settings=media,
        speech=generation.speech,
        preprocessor=checkpoint.preprocessor,
    )
    return plan_request(
        model_facts(checkpoint, speech=generation.speech),
        shape,
        generation,
        device=request.device,
        dtype=request.dtype,
        max_memory=request.max_memory,
        allow=request.allow,
    )
