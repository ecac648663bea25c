"""The phases of a request: what each holds besides the weights of its modules. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from lowvram.config import DecoderConfig
from lowvram.conversation import PromptShape
from lowvram.engine.pieces import VocodeSettings
from lowvram.planner import laws
from lowvram.planner.kernels import Kernels
from lowvram.planner.model import ModelFacts, PartSizes
from lowvram.planner.sound import native_bytes, vocode_bytes, vocode_kept_bytes
from lowvram.settings import GenerationSettings
from lowvram.tensors import Part

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

CONVERTED_BYTES = 4 << 20
"""Of stored weights that are converted at a time (`SCRATCH_BYTES` of `offload/store.py`)."""

Home = Literal["device", "host"]


@dataclass(frozen=True, kw_only=True)
class PhaseLoad:
    """A phase: the modules it runs, and the bytes it holds besides their weights while it computes.

    `steps` are its activations once it has begun, where they are fewer than at its beginning, and
    `kept` those of them that are there between its steps as well. `loading` is what it holds
    instead while its modules come to the device; carry is there in both.
    """

    name: str
    modules: tuple[Part, ...]
    kv: int = 0
    workspace: int = 0
    carry: int = 0
    activations: int = 0
    steps: int | None = None
    kept: int = 0
    loading: int = 0

    @property
    def computing(self) -> int:
        return self.kv + self.workspace + self.carry + self.activations

    def joined(self, other: PhaseLoad) -> PhaseLoad:
        """This one, and once it has begun both in turn: what each keeps adds up; of what they hold
        in turn, the larger. Each's modules come when the other's cache, or what it keeps, may be
        there. The workspace is that of the fullest turn, and activations count from there."""
        own = self.activations if self.steps is None else self.steps
        others = other.activations if other.steps is None else other.steps
        steps = (
            _Turn(self.workspace, own + other.kept),
            _Turn(other.workspace, self.kept + others),
        )
        begins = (
            _Turn(self.workspace, self.activations),
            _Turn(other.workspace, self.kept + other.activations),
        )
        workspace = max(*steps, *begins, key=sum).workspace
        return PhaseLoad(
            name=f"{self.name}+{other.name}",
            modules=self.modules + other.modules,
            kv=self.kv + other.kv,
            workspace=workspace,
            carry=max(self.carry, other.carry),
            activations=max(map(sum, (*steps, *begins))) - workspace,
            steps=max(map(sum, steps)) - workspace,
            kept=self.kept + other.kept,
            loading=max(self.loading + other.kept, other.loading + self.kv),
        )

    def aloud(self, sound: PhaseLoad, end: PhaseLoad) -> PhaseLoad:
        """The Talker with the `sound` of its codes in turn, and then the `end` of the speech, which
        is made when its keys and values are gone."""
        return self.joined(sound).followed(end, gone=self.kv)

    def followed(self, end: PhaseLoad, *, gone: int) -> PhaseLoad:
        """With what comes when `gone` bytes of this one are no longer there."""
        after = end.workspace + end.activations - gone - self.workspace
        return replace(
            self,
            activations=max(self.activations, after),
            steps=max(self.activations if self.steps is None else self.steps, after),
        )


class _Turn(NamedTuple):
    """One of the phases that take turns: its scratch, which it gives back, and all activations
    that are there meanwhile."""

    workspace: int
    activations: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One request to one model on one type of device, before anything is decided.

    `itemsize` is that of the activations, `dit_itemsize` that of the DiT's layers; keys and values
    may be `kv_rounded`. `host_is_device`: on the CPU the prompt's embeddings and states count
    against the budget; else they wait on the host and cost the device nothing. `unpacks`: packed
    linears that stay are de-quantized for every product, `unpacks_streamed` those that stream,
    `widens` those that options rounded, for want of a product of 8 bits. `whole` parts cannot
    stream. `converted` parts are stored in another type, and read through memory that counts.
    `settings` name their bounds. `kept_bytes` count in every phase; where it is `modulated`, the
    vocoder's modulations are among them on the CPU.
    """

    model: ModelFacts
    shape: PromptShape
    settings: GenerationSettings
    sizes: Mapping[Part, PartSizes]
    itemsize: int
    kv_rounded: bool
    kernels: Kernels
    unpacks: bool
    unpacks_streamed: bool
    host_is_device: bool
    widens: bool = False
    dit_itemsize: int = 4
    whole: frozenset[Part] = frozenset()
    converted: frozenset[Part] = frozenset()
    kept_bytes: int = 0
    modulated: bool = False

    @property
    def speaks(self) -> bool:
        """A reply of one token leaves nothing to say."""
        settings = self.settings
        return settings.speech and settings.tokens > 1 and self.model.config.speaks

    @property
    def talker_tokens(self) -> int:
        """Of the Talker's prompt: the Thinker's, the voice and the first of the reply."""
        return self.shape.tokens + 2

    @cached_property
    def host_states(self) -> int:
        """Bytes of the prompt's embeddings and, where it speaks, of all states, on the host."""
        width = self.model.config.thinker.text.hidden_size
        return self._said + laws.states_bytes(width, self.shape.tokens, self.itemsize)

    @property
    def _said(self) -> int:
        """Bytes of all states where it speaks: what waits on the host until they are spoken."""
        width = self.model.config.thinker.text.hidden_size
        tokens = self.shape.tokens + self.settings.tokens if self.speaks else 0
        return laws.states_bytes(width, tokens, self.itemsize)

    @property
    def _carry(self) -> int:
        return self.host_states if self.host_is_device else 0

    def reading(self, part: Part) -> int:
        """What reading a part's weights takes besides them."""
        return CONVERTED_BYTES if part in self.converted else 0

    def towers(self) -> list[PhaseLoad]:
        """The phases before the prompt, where the request has media."""
        phases = []
        thinker = self.model.config.thinker
        if self.shape.grids:
            patches = max(height * width for _, height, width in self.shape.grids)
            work = laws.vision_bytes(thinker.vision, patches, self.itemsize, self.kernels)
            phases.append(
                PhaseLoad(
                    name="vision",
                    modules=("visual",),
                    carry=self._carry,
                    activations=work,
                    loading=self.reading("visual"),
                )
            )
        if self.shape.audio_frames:
            frames = min(2 * thinker.audio.n_window, max(self.shape.audio_frames))
            work = laws.audio_bytes(thinker.audio, frames, self.itemsize, self.kernels)
            phases.append(
                PhaseLoad(
                    name="audio",
                    modules=("audio",),
                    carry=self._carry,
                    activations=work,
                    loading=self.reading("audio"),
                )
            )
        return phases

    def think(self, kv: Home, chunk: int, streams: bool) -> list[PhaseLoad]:
        """Prefill and decode. `streams`: some of the text model comes through slabs."""
        text = self.model.config.thinker.text
        tokens, size = self.shape.tokens, self.itemsize
        by_layers = streams or kv == "host"
        sizes = self.sizes["text"]
        scratch = sizes.scratch_streamed + self.reading("text") if streams else sizes.scratch
        between = self.between_layers("text") if by_layers and self.host_is_device else 0
        held = self._kv_bytes("text", kv)
        work = laws.prefill_bytes(text, tokens, size, chunk, self.kernels, by_layers=by_layers)
        if between:
            work = max(work, laws.tables_bytes(text, tokens, size))
        prefill = PhaseLoad(
            name="prefill",
            modules=("text",),
            kv=held,
            workspace=scratch,
            carry=self._carry + between,
            activations=work,
            loading=max(sizes.loading, self.reading("text")),
        )
        steps = self.settings.tokens > 1  # the last token is drawn and goes no further
        context = tokens + self.settings.tokens
        step = laws.decode_bytes(text, context, size, self.kernels, by_layers=by_layers)
        decode = PhaseLoad(
            name="decode",
            modules=("text",),
            kv=held,
            workspace=scratch if steps else 0,
            carry=self._said if self.host_is_device else 0,
            activations=step if steps else laws.drawing_bytes(text, self.kernels),
            kept=laws.waiting_bytes(text, self.kernels),
        )
        return [prefill, decode]

    def talk(self, kv: Home, chunk: int, streams: bool) -> PhaseLoad:
        """Codes from the Thinker's states."""
        config = self.model.config.talker
        assert config is not None
        tokens, size = self.talker_tokens, self.itemsize
        by_layers = streams or kv == "host"
        carry = 0
        if self.host_is_device:
            carry = self._said + (self.between_layers("talker") if by_layers else 0)
        work = laws.talk_bytes(config, tokens, size, chunk, self.kernels, by_layers=by_layers)
        if by_layers and self.host_is_device:
            work = max(work, laws.tables_bytes(config.decoder, tokens, size))
        step = laws.talk_step_bytes(config, tokens, size, self.kernels, by_layers=by_layers)
        kept = laws.waiting_bytes(config.decoder, self.kernels)
        kept += laws.talk_kept_bytes(config, size)
        # What streams is also read ahead, while others have their turn.
        reading = self.reading("talker") if streams else 0
        return PhaseLoad(
            name="talk",
            modules=("talker",),
            kv=self._kv_bytes("talker", kv),
            workspace=reading if streams else self.sizes["talker"].scratch,
            carry=carry,
            activations=work,
            steps=step,
            kept=kept + reading,
            loading=max(self.sizes["talker"].loading, self.reading("talker")),
        )

    @property
    def pieces(self) -> VocodeSettings:
        """How codes become sound."""
        return VocodeSettings.of_request(self.settings)

    @property
    def first_codes(self) -> int:
        """Codes before the first piece of speech can be made."""
        dit = self.model.config.dit
        assert dit is not None
        return self.pieces.first_codes(dit)

    def talk_aloud(self) -> PhaseLoad:
        """Codes, and sound from them, while the Thinker writes: as many codes as it has tokens."""
        said = min(self.settings.codes, self.settings.tokens)
        talk = self.talk("device", laws.CHUNKS[0], False)
        return talk.aloud(self.vocode(said, ended=False), self.vocode(said))

    def think_aloud(self, decode: PhaseLoad) -> PhaseLoad:
        """Decoding with speech beside it; speech goes on when that has given back what it took."""
        both = decode.joined(self.talk_aloud())
        talk = self.talk("device", laws.CHUNKS[0], False)
        alone = talk.aloud(self.vocode(ended=False), self.vocode())
        return both.followed(alone, gone=decode.kv)

    def vocode(self, codes: int | None = None, *, ended: bool = True) -> PhaseLoad:
        """Sound from `codes` codes, of as many as there may be; where the speech has not `ended`,
        what is made before it does."""
        config = self.model.config
        codes = self.settings.codes if codes is None else codes
        assert config.dit is not None and config.bigvgan is not None
        modulated = self.host_is_device and self.modulated
        work = vocode_bytes(
            config.dit,
            config.bigvgan,
            self.pieces,
            codes,
            self.model.voice_frames,
            self.kernels,
            itemsize=self.dit_itemsize,
            modulated=modulated,
            ended=ended,
        )
        kept = vocode_kept_bytes(
            config.dit,
            self.pieces,
            codes,
            itemsize=self.dit_itemsize,
            modulated=modulated,
        )
        # Half of what its convolutions take on a CPU is kept for the next.
        native = native_bytes(config.bigvgan) if self.host_is_device else 0
        return PhaseLoad(
            name="vocode",
            modules=("token2wav",),
            workspace=native,
            activations=work,
            kept=kept + native // 2,
            loading=self.reading("token2wav"),
        )

    def between_layers(self, part: Part) -> int:
        """Bytes that wait on the host while a prompt goes through layer by layer: rotary tables,
        and the states between two layers. Those of a Thinker that speaks are the Talker's."""
        decoder = self.decoder(part)
        tokens = self.shape.tokens if part == "text" else self.talker_tokens
        own = 0 if part == "text" and self.speaks else tokens
        return laws.states_bytes(decoder.hidden_size, own, self.itemsize) + laws.rope_bytes(
            decoder, tokens, self.itemsize
        )

    def decoder(self, part: Part) -> DecoderConfig:
        """Of `text` or `talker`."""
        config = self.model.config
        if part == "text" or config.talker is None:
            return config.thinker.text
        return config.talker.decoder

    def kv_tokens(self, part: Part) -> int:
        """Positions in the cache of `text` or `talker`."""
        if part == "text":
            return self.shape.tokens + self.settings.tokens
        return self.talker_tokens + self.settings.codes

    def kv_layer_bytes(self, part: Part) -> int:
        """Keys and values of one layer of `text` or `talker`, as they are kept."""
        law = laws.rounded_kv_layer_bytes if self.kv_rounded else laws.kv_layer_bytes
        return law(self.decoder(part), self.kv_tokens(part), self.itemsize)

    def kv_wide_bytes(self, part: Part) -> int:
        """Those of one layer as they are computed with, where that is not how they are kept."""
        if not self.kv_rounded:
            return 0
        return laws.kv_layer_bytes(self.decoder(part), self.kv_tokens(part), self.itemsize)

    def kv_layers(self, part: Part) -> int:
        return self.sizes[part].layers

    def _kv_bytes(self, part: Part, home: Home) -> int:
        """On the device: every layer's, or two layers' that take turns."""
        layers = 2 if home == "host" else self.kv_layers(part)
        return self.kv_layer_bytes(part) * layers + self.kv_wide_bytes(part)
