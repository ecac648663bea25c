"""What is asked of the planner, and the request that follows from it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from lowvram.conversation import PromptShape, check_window
from lowvram.errors import UsageError
from lowvram.planner.choices import MODULES
from lowvram.planner.device import DeviceFacts, DtypeChoice
from lowvram.planner.kernels import kernels_of
from lowvram.planner.model import ModelFacts, PartSizes
from lowvram.planner.phases import ITEMSIZE, Request
from lowvram.quant import (
    HEAD_OPTIONS,
    STREAMING,
    HeadBits,
    HeadChoice,
    KernelChoice,
    choose_head,
    preferred_kernel,
)
from lowvram.settings import CODES_PER_SECOND, GenerationSettings
from lowvram.tensors import Part

Kernel = Literal["auto", "reference"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A request to a model on a device.

    `settings` name their bounds. `allow` are options that may change results, `later` those of them
    that no engine knows yet and whose effect on memory is wanted all the same. `kept_bytes` and
    `modulated` are as for `make_plan`.
    """

    model: ModelFacts
    shape: PromptShape
    settings: GenerationSettings
    facts: DeviceFacts
    dtype: DtypeChoice
    allow: tuple[str, ...] = ()
    kernel: Kernel = "auto"
    later: frozenset[str] = frozenset()
    kept_bytes: int = 0
    modulated: bool = False

    @cached_property
    def packed_kernel(self) -> KernelChoice:
        """Of packed linears that stay."""
        least = self.model.least_packed
        return preferred_kernel(self.facts.type, self.dtype.name, self.kernel, least)

    @cached_property
    def head(self) -> HeadChoice | None:
        """How the Thinker's head is rounded; None where nothing that would do so is allowed."""
        text = self.model.config.thinker.text
        return choose_head(self.allow, self.packed_kernel.name, text.hidden_size, text.vocab_size)

    def check(self) -> None:
        """
        Raises:
            UsageError: prompt and reply, or prompt and speech, are beyond the model's window.
        """
        config, settings = self.model.config, self.settings
        check_window(
            self.shape.next_position, settings.tokens, config.thinker.text.max_position_embeddings
        )
        if settings.speech and config.talker is not None:
            # After the prompt come the voice and the first token of the reply.
            limit = config.talker.decoder.max_position_embeddings
            most = limit - self.shape.next_position - 2
            if settings.codes > most:
                raise UsageError(
                    f"speech of up to {settings.codes / CODES_PER_SECOND:g} s is more than the "
                    f"Talker's window of {limit} positions leaves beside this prompt; use at most "
                    f"{max(0, most) / CODES_PER_SECOND:g} s (max_speech_seconds, --max-speech)"
                )

    def request(self) -> Request:
        size = ITEMSIZE[self.dtype.name]
        return Request(
            model=self.model,
            shape=self.shape,
            settings=self.settings,
            sizes={part: self._sizes(part, size) for part in MODULES},
            itemsize=size,
            kv_itemsize=1 if "kv8" in self.later else size,
            kernels=kernels_of(self.facts.type),
            unpacks=self.packed_kernel.name == "reference",
            unpacks_streamed=self.packed_kernel.name not in STREAMING,
            host_is_device=self.facts.type == "cpu",
            kept_bytes=self.kept_bytes if self.facts.type == "cpu" else 0,
            modulated=self.modulated,
            converted=self._converted,
        )

    @property
    def _converted(self) -> frozenset[Part]:
        """Parts whose weights are converted while they are read. The vocoder is fp32, in the file
        as well unless that is packed."""
        if self.facts.type != "cpu":
            return frozenset()
        changed = self.model.stored_dtype != self.dtype.name
        vocoder: set[Part] = {"token2wav"} if self.model.packed else set()
        others = {part for part in MODULES if part != "token2wav"} if changed else set()
        return frozenset(others | vocoder)

    def _sizes(self, part: Part, itemsize: int) -> PartSizes:
        sizes = self.model.part_sizes(
            part,
            itemsize,
            self.packed_kernel.name,
            self._head_bits,
            aligned=self.facts.type in ("cuda", "npu"),
        )
        if part == "token2wav" and self.modulated:
            sizes = replace(sizes, passing=0)
        halved = {"talker8": "talker", "vocoder16": "token2wav"}
        return sizes.halved() if any(halved.get(name) == part for name in self.later) else sizes

    @property
    def _head_bits(self) -> HeadBits | None:
        for name, bits in HEAD_OPTIONS.items():
            if name in self.later:
                return bits
        return self.head.bits if self.head else None

    def with_later(self, *names: str) -> Question:
        """The same question as if those options existed and were allowed."""
        return replace(self, later=frozenset(names))
