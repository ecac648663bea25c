"""What a plan needs to know of a model: shapes, and how many bytes every part and unit takes.

Taken from an opened checkpoint, or from a `config.json` alone: nothing here reads a weight.
No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lowvram.checkpoint import GenerationDefaults
from lowvram.config import OmniConfig
from lowvram.models.head_rows import head_piece_rows
from lowvram.offload import blob_bytes
from lowvram.quant import (
    AS_STORED,
    HEAD_OPTIONS,
    KernelName,
    eight_bit_scratch_bytes,
    head_bytes,
    linear_bytes,
    loading_bytes,
    rounded_bytes,
    rounding_bytes,
    scratch_bytes,
)
from lowvram.specs import VOICE_FRAMES
from lowvram.tensors import (
    HEAD_NAME,
    PASSING_NAMES,
    Part,
    Shape,
    expected_tensors,
    layer_of,
    part_of,
    thinker_linears,
)

if TYPE_CHECKING:
    from lowvram.checkpoint import Checkpoint


DIT_LAYERS = "code2wav_dit_model.transformer_blocks."
"""In the names of what `vocoder16` holds in 16 bits, but for the modulations' biases."""


@dataclass(frozen=True)
class Unit:
    """What can be streamed by itself: a decoder layer, or a piece of the Thinker's head.

    `held` are its bytes where it stays on the device, `blob` its bytes where it is streamed: as the
    file holds it, at aligned offsets. `packed` counts its 4-bit weights.
    """

    held: int
    blob: int
    packed: int = 0


@dataclass(frozen=True)
class PartSizes:
    """A part's bytes: its units in the order they run, `layers` of them decoder layers and the
    others pieces of the head, and all else of it, which stays while the part is used.

    `loading` is what bringing it to the device takes besides it, `scratch` what computing with
    packed weights takes besides them, `scratch_streamed` the same where some are streamed.
    `passing` is read when the part is used, if an earlier request has not, and never held.
    `rounded` counts 8-bit weights.
    """

    rest: int
    units: tuple[Unit, ...] = ()
    layers: int = 0
    loading: int = 0
    scratch: int = 0
    scratch_streamed: int = 0
    passing: int = 0
    rounded: int = 0

    @cached_property
    def total(self) -> int:
        """All of it on the device."""
        return self.rest + sum(unit.held for unit in self.units)

    @cached_property
    def packed(self) -> int:
        """4-bit weights of all of it."""
        return sum(unit.packed for unit in self.units)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFacts:
    """A model as the planner sees it.

    `packed` names the linears of the Thinker that are held at 4 bits; `stored_dtype` is the type of
    all other weights; `voice_frames` are the mel frames of the longest voice's reference.
    """

    name: str
    config: OmniConfig
    packed: frozenset[str]
    stored_dtype: str
    voice_frames: int
    generation: GenerationDefaults

    @cached_property
    def tensors(self) -> Mapping[str, Shape]:
        """Every tensor by name, and its shape."""
        return expected_tensors(self.config, self.packed.__contains__)

    @cached_property
    def _by_part(self) -> dict[Part, dict[str, Shape]]:
        found: dict[Part, dict[str, Shape]] = {}
        for name, shape in self.tensors.items():
            found.setdefault(part_of(name), {})[name] = shape
        return found

    def part_sizes(
        self,
        part: Part,
        itemsize: int,
        kernel: KernelName = "reference",
        used: Collection[str] = (),
        *,
        aligned: bool = False,
    ) -> PartSizes:
        """Bytes of a part whose weights are held at `itemsize` bytes each; counted once.

        Token2wav is float32, but for `vocoder16`. Packed linears take what `kernel` holds of them
        where they stay; `used` are options (see `allowed.py`), of which one that rounds the
        Thinker's head makes it no unit. `aligned`: the device gives every tensor a multiple of what
        blobs are aligned to.
        """
        key = part, itemsize, kernel, frozenset(used), aligned
        if key not in self._counted:
            self._counted[key] = self._part_sizes(*key)
        return self._counted[key]

    @cached_property
    def _counted(self) -> dict[tuple[Part, int, KernelName, frozenset[str], bool], PartSizes]:
        return {}

    def _part_sizes(
        self,
        part: Part,
        itemsize: int,
        kernel: KernelName,
        used: frozenset[str],
        aligned: bool,
    ) -> PartSizes:
        space = _aligned if aligned else _exact
        eight = part == "talker" and "talker8" in used
        size = 4 if part == "token2wav" else itemsize
        halves = "vocoder16" in used
        rest = passing = 0
        layers: dict[int, dict[str, Shape]] = {}
        for name, shape in self._by_part.get(part, {}).items():
            place = layer_of(name)
            if place is not None:
                layers.setdefault(place[1], {})[name] = shape
            elif name.endswith(PASSING_NAMES):
                passing += math.prod(shape) * size
            elif name != HEAD_NAME:
                halved = halves and DIT_LAYERS in name and ".attn_norm." not in name
                rest += space(math.prod(shape) * (2 if halved else size))
        units = [self._layer(layers[i], size, kernel, space, eight) for i in sorted(layers)]
        count = len(units)
        if eight:
            return _rounded(rest, units, layers.values(), size)
        if part != "text":
            return PartSizes(rest, tuple(units), count, passing=passing)
        text = self.config.thinker.text
        head = next((bits for name, bits in HEAD_OPTIONS.items() if name in used), None)
        if head is None:
            units += _head_pieces(text.vocab_size, text.hidden_size, size)
        else:
            rest += head_bytes(text.hidden_size, text.vocab_size, head)
        scratch = self._largest_of_blocks(kernel, _scratch)
        scratch = max(scratch, self._scratch_of_refused(kernel))
        # What streams has to do with the same scratch if `native` turns out not to be there.
        streamed = scratch
        if kernel != "native":
            streamed = self._largest_of_blocks("reference", _scratch)
        return PartSizes(
            rest,
            tuple(units),
            count,
            loading=max(
                self._largest_of_blocks(kernel, _loading),
                rounding_bytes(text.hidden_size, text.vocab_size) if head else 0,
            ),
            scratch=scratch,
            scratch_streamed=streamed,
        )

    def _layer(
        self,
        tensors: Mapping[str, Shape],
        size: int,
        kernel: KernelName,
        space: Callable[[int], int],
        eight: bool,
    ) -> Unit:
        group = self.config.quant.group_size if self.config.quant else 1
        held = packed = 0
        blob: list[int] = []
        for name, shape in tensors.items():
            linear, _, kind = name.rpartition(".")
            stored = {"qweight": 4, "qzeros": 4, "scales": 2} if linear in self.packed else {}
            nbytes = math.prod(shape) * stored.get(kind, size)
            blob.append(nbytes)
            if kind == "qweight":
                packed += nbytes * 2
            if eight and len(shape) == 2:
                held += space(math.prod(shape)) + space(2 * shape[0])
            elif kind not in stored or kernel in AS_STORED:
                held += space(nbytes)
            elif kind == "qweight":
                inputs, outputs = shape[0], shape[1] * 8
                pairs = linear_bytes(inputs, outputs, group, kernel) - nbytes
                held += space(nbytes) + space(pairs)
        return Unit(held, blob_bytes(blob), packed)

    def _largest_of_blocks(self, kernel: KernelName, cost: _BlockCost) -> int:
        """The largest cost of any packed linear; those of one block and input may be joined, but
        by kernels that gain from it."""
        group = self.config.quant.group_size if self.config.quant else 1
        joined: dict[tuple[str, int], int] = {}
        for name, (inputs, outputs, _) in self._linears.items():
            if name in self.packed:
                block = name if kernel == "reference" else name.rpartition(".")[0], inputs
                joined[block] = joined.get(block, 0) + outputs
        shapes = {(inputs, outputs) for (_, inputs), outputs in joined.items()}
        return max((cost(i, o, group, kernel) for i, o in shapes), default=0)

    @cached_property
    def least_packed(self) -> int:
        """4-bit weights of the smallest packed linear; 0 where there is none."""
        shapes = (self._linears[name][:2] for name in self.packed)
        return min((inputs * outputs for inputs, outputs in shapes), default=0)

    def _scratch_of_refused(self, kernel: KernelName) -> int:
        """What the reference takes for linears of a shape that `kernel` may refuse."""
        group = self.config.quant.group_size if self.config.quant else 1
        shapes = {self._linears[name][:2] for name in self.packed}
        refused = [(i, o) for i, o in shapes if kernel != "reference" and (i % 64 or o % 64)]
        return max((_scratch(i, o, group, "reference") for i, o in refused), default=0)

    @cached_property
    def _linears(self) -> dict[str, tuple[int, int, bool]]:
        return thinker_linears(self.config.thinker)


def _rounded(
    rest: int, units: Sequence[Unit], layers: Iterable[Mapping[str, Shape]], size: int
) -> PartSizes:
    """Of a part whose layers' linears are of 8 bits; those of one block and input may be joined."""
    joined: dict[tuple[str, int], int] = {}
    for tensors in layers:
        for name, shape in tensors.items():
            if len(shape) == 2:
                block = name.rpartition(".")[0].rpartition(".")[0], shape[1]
                joined[block] = joined.get(block, 0) + shape[0]
    shapes = {(inputs, outputs) for (_, inputs), outputs in joined.items()}
    return PartSizes(
        rest,
        tuple(units),
        len(units),
        loading=max(max(rounding_bytes(*one), rounded_bytes(*one)) for one in shapes),
        scratch=max(eight_bit_scratch_bytes(*one, size) for one in shapes),
        rounded=sum(inputs * outputs for (_, inputs), outputs in joined.items()),
    )


def _exact(nbytes: int) -> int:
    return nbytes


def _aligned(nbytes: int) -> int:
    return blob_bytes([nbytes])


_BlockCost = Callable[[int, int, int, KernelName], int]
"""(inputs, outputs, group, kernel) -> bytes."""


def _scratch(inputs: int, outputs: int, group: int, kernel: KernelName) -> int:
    return scratch_bytes(inputs, outputs, kernel, group)


def _loading(inputs: int, outputs: int, group: int, kernel: KernelName) -> int:
    return loading_bytes(inputs, outputs, group, kernel)


def _head_pieces(outputs: int, inputs: int, size: int) -> list[Unit]:
    rows = head_piece_rows(inputs, size)
    stops = range(0, outputs, rows)
    counts = (min(rows, outputs - start) for start in stops)
    return [Unit(n * inputs * size, blob_bytes([n * inputs * size])) for n in counts]


def model_facts(checkpoint: Checkpoint, *, speech: bool = True) -> ModelFacts:
    """What an opened checkpoint's headers say. Without `speech` its voices are not looked at.

    Raises:
        CheckpointError: a file that is needed is missing or damaged.
    """
    linears = thinker_linears(checkpoint.config.thinker)
    return ModelFacts(
        name=checkpoint.name,
        config=checkpoint.config,
        packed=frozenset(filter(checkpoint.quantized, linears)),
        stored_dtype=checkpoint.stored_dtype,
        voice_frames=checkpoint.voice_frames if speech else 0,
        generation=checkpoint.generation,
    )


def config_facts(name: str, config: OmniConfig) -> ModelFacts:
    """What a `config.json` alone says: linears packed if it speaks of a packing, voices and bounds
    of replies as in the published checkpoints."""
    linears = thinker_linears(config.thinker) if config.quant else ()
    return ModelFacts(
        name=name,
        config=config,
        packed=frozenset(linears),
        stored_dtype=config.dtype,
        voice_frames=VOICE_FRAMES,
        generation=GenerationDefaults(eos_token_ids=(), codec_end_ids=()),
    )
