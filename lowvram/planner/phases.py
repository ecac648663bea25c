"""The phases of a request, before anything is decided about where modules stay. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram.engine.pieces import VocodeSettings
from lowvram.planner import laws
from lowvram.planner.model import ModelFacts, PartSizes
from lowvram.settings import GenerationSettings

if TYPE_CHECKING:
    from lowvram.conversation import PromptShape

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class PhaseLoad:
    """A phase: the modules it runs, and the bytes it holds besides their weights."""

    name: str
    modules: tuple[str, ...]
    kv: int = 0
    workspace: int = 0
    carry: int = 0
    activations: int = 0

    def joined(self, other: PhaseLoad) -> PhaseLoad:
        """Both interleaved: what each keeps adds up; of their activations the larger counts."""
        return PhaseLoad(
            f"{self.name}+{other.name}",
            self.modules + other.modules,
            self.kv + other.kv,
            max(self.workspace, other.workspace),
            max(self.carry, other.carry),
            max(self.activations, other.activations),
        )


def request_phases(
    model: ModelFacts,
    shape: PromptShape,
    settings: GenerationSettings,
    *,
    dtype: str,
    text_sizes: PartSizes,
    head_loading: int = 0,
    host_is_device: bool,
) -> list[PhaseLoad]:
    """The phases of one request, in order.

    `host_is_device`: on the CPU the prompt's embeddings and states count against the budget; else
    they wait on the host and cost the device nothing.
    `head_loading` is what loading a rounded head takes besides it.
    """
    config = model.config
    text = config.thinker.text
    size = ITEMSIZE[dtype]
    tokens, reply = shape.tokens, settings.tokens
    row = laws.states_bytes(text.hidden_size, 1, size)
    prompt = states = spoken = 0
    if host_is_device:
        prompt = tokens * row
    if host_is_device and settings.speech:
        states = (tokens + reply) * row
        # The Talker's first input is a copy of the states.
        spoken = 2 * states
    phases = []
    if shape.grids:
        largest = max(height * width for _, height, width in shape.grids)
        work = laws.vision_bytes(config.thinker.vision, largest, size)
        phases.append(PhaseLoad("vision", ("visual",), carry=prompt + states, activations=work))
    if shape.audio_frames:
        work = laws.audio_bytes(config.thinker.audio, size)
        phases.append(PhaseLoad("audio", ("audio",), carry=prompt + states, activations=work))
    kv = laws.kv_bytes(text, tokens + reply, size)
    work = laws.prefill_bytes(text, tokens, size)
    scratch = max(text_sizes.scratch, text_sizes.loading)
    loading = scratch + head_loading
    phases.append(PhaseLoad("prefill", ("text",), kv, loading, prompt + states, work))
    work = laws.decode_bytes(text, size)
    phases.append(PhaseLoad("decode", ("text",), kv, scratch, prompt + states, work))
    if settings.speech and config.talker and config.dit and config.bigvgan:
        codes = settings.codes
        decoder = config.talker.decoder
        kv = laws.kv_bytes(decoder, tokens + 2 + codes, size)
        work = laws.talk_bytes(config.talker, tokens + 2, size)
        phases.append(PhaseLoad("talk", ("talker",), kv, carry=spoken, activations=work))
        pieces = VocodeSettings(solver=settings.solver, whole=settings.whole_speech)
        work = laws.vocode_bytes(config.dit, config.bigvgan, pieces, codes, model.voice_frames)
        phases.append(PhaseLoad("vocode", ("token2wav",), activations=work))
    return phases
