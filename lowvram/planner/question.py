"""What is asked of the planner, and the request that follows from it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from lowvram.conversation import PromptShape, check_window
from lowvram.errors import UsageError
from lowvram.planner.allowed import options_of
from lowvram.planner.choices import MODULES
from lowvram.planner.device import DeviceFacts, DtypeChoice
from lowvram.planner.kernels import kernels_of
from lowvram.planner.model import ModelFacts, PartSizes
from lowvram.planner.phases import ITEMSIZE, Request
from lowvram.quant import (
    HEAD_OPTIONS,
    STREAMING,
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

    `settings` name their bounds. `allow` are options that may change results, `used` those of them
    that are in effect; see `ways`. `kept_bytes` and `modulated` are as for `make_plan`.
    """

    model: ModelFacts
    shape: PromptShape
    settings: GenerationSettings
    facts: DeviceFacts
    dtype: DtypeChoice
    allow: tuple[str, ...] = ()
    kernel: Kernel = "auto"
    used: frozenset[str] = frozenset()
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

    def ways(self) -> list[Question]:
        """The question with every allowed option in effect that can be, and, because a rounded
        Talker cannot be streamed from the file, without `talker8`; the better first."""
        used = frozenset(name for name in self.allow if self.refused(name) is None)
        ways = [used, used - {"talker8"}] if "talker8" in used else [used]
        return [replace(self, used=some) for some in ways]

    def refused(self, name: str) -> str | None:
        """Why an option has no effect on this device; None if it has."""
        if name not in HEAD_OPTIONS:
            return None
        if self.head is None:
            return None
        if self.head.bits is None:
            return self.head.reason
        if self.head.bits != HEAD_OPTIONS[name]:
            return f"{name} is not used: another option rounds the head"
        return None

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
            kv_rounded="kv8" in self.used,
            kernels=kernels_of(self.facts.type),
            unpacks=self.packed_kernel.name == "reference",
            unpacks_streamed=self.packed_kernel.name not in STREAMING,
            widens=self.packed_kernel.name not in ("cpu", "native", "triton"),
            dit_itemsize=2 if "vocoder16" in self.used else 4,
            whole=frozenset({"talker"} if "talker8" in self.used else ()),
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
        vocoder: set[Part] = (
            {"token2wav"} if self.model.packed or "vocoder16" in self.used else set()
        )
        others = {part for part in MODULES if part != "token2wav"} if changed else set()
        return frozenset(others | vocoder)

    def stored_sizes(self, part: Part) -> PartSizes:
        """Of a part that is built without any option."""
        return replace(self, used=frozenset())._sizes(part, ITEMSIZE[self.dtype.name])

    def _sizes(self, part: Part, itemsize: int) -> PartSizes:
        sizes = self.model.part_sizes(
            part,
            itemsize,
            self.packed_kernel.name,
            options_of(part, self.used),
            aligned=self.facts.type in ("cuda", "npu"),
        )
        if part == "token2wav" and self.modulated:
            sizes = replace(sizes, passing=0)
        return sizes

    def allowing(self, *names: str) -> Question:
        """The same question with those options allowed too."""
        return replace(self, allow=(*self.allow, *names))
