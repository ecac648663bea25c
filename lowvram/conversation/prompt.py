"""A conversation as ids, with a place for every vector that the towers will give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lowvram.config import ThinkerConfig
from lowvram.conversation.messages import KINDS, Kind, Message
from lowvram.conversation.pixels import PixelFormat
from lowvram.conversation.positions import HeardVideo, Picture, Run, Span, chunks, positions
from lowvram.conversation.tokenizer import Tokenizer
from lowvram.conversation.tokens import audio_tokens, grid_tokens
from lowvram.errors import CheckpointError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class MediaShape:
    """One medium's size. `grid` in patches where it is seen, `audio_frames` where it is heard.

    `seconds_per_grid` is the time from one pair of video frames to the next.
    """

    kind: Kind
    grid: Grid | None = None
    audio_frames: int | None = None
    seconds_per_grid: float = 0.0


@dataclass(frozen=True)
class PromptShape:
    """All that a plan needs to know of a prompt.

    `tokens` in all; `next_position`, where the reply begins; `grids` (time, height, width) in
    patches of every image and video, and `audio_frames` (mel frames of 10 ms) of every recording
    and sound track, in prompt order.
    """

    tokens: int
    next_position: int
    grids: tuple[Grid, ...] = ()
    audio_frames: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class VisionInput:
    """An image or a video: `grid` in patches, `slots` the indices into the prompt that it fills.

    `frames` are the resized frames, uint8 [n, height, width, 3].
    """

    grid: Grid
    slots: np.ndarray
    frames: np.ndarray
    format: PixelFormat
    seconds_per_grid: float = 0.0

    def patches(self, pair: int) -> np.ndarray:
        """Patches of one frame pair, made now: float32 [height * width, patch_values]."""
        return self.format.patches(self.frames, pair)


@dataclass(frozen=True, eq=False)
class AudioInput:
    """A recording or sound track: `features` float32 [num_mel_bins, frames], and its `slots`."""

    features: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation, ready for the model.

    `ids` int64 [T]; `positions` int64 [3, T] (time, height, width); `next_position`, that of the
    reply's first token; `vision` and `audio` in prompt order.
    """

    ids: np.ndarray
    positions: np.ndarray
    next_position: int
    vision: tuple[VisionInput, ...] = ()
    audio: tuple[AudioInput, ...] = ()

    @property
    def shape(self) -> PromptShape:
        return PromptShape(
            tokens=len(self.ids),
            next_position=self.next_position,
            grids=tuple(item.grid for item in self.vision),
            audio_frames=tuple(item.features.shape[1] for item in self.audio),
        )


@dataclass(frozen=True, eq=False)
class Layout:
    """Ids and positions, and which of the ids each medium fills, in prompt order."""

    ids: np.ndarray
    positions: np.ndarray
    vision_slots: tuple[np.ndarray, ...]
    audio_slots: tuple[np.ndarray, ...]

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


def lay_out(
    messages: tuple[Message, ...],
    shapes: Sequence[MediaShape],
    tokenizer: Tokenizer,
    config: ThinkerConfig,
) -> Layout:
    """The prompt of a conversation whose media have those shapes, in the order of the messages.

    Raises:
        CheckpointError: tokenizer, chat template and config do not belong together.
    """
    places = _placeholders(tokenizer, config)
    waiting = {kind: iter([s for s in shapes if s.kind == kind]) for kind in KINDS}
    page = _Page(config)
    for piece in tokenizer.pieces(messages):
        if isinstance(piece, str):
            page.write(tokenizer.encode(piece))
        elif piece in places:
            shape = next(waiting[places[piece]], None)
            if shape is None:
                raise _template_mismatch(places[piece], "more")
            page.place(shape)
        else:
            page.write([piece])
    for kind, left in waiting.items():
        if next(left, None) is not None:
            raise _template_mismatch(kind, "fewer")
    return page.layout()


@dataclass
class _Page:
    """A prompt being written."""

    config: ThinkerConfig
    ids: list[np.ndarray] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    vision_slots: list[np.ndarray] = field(default_factory=list)
    audio_slots: list[np.ndarray] = field(default_factory=list)
    length: int = 0

    def write(self, ids: Sequence[int]) -> None:
        if ids:
            self.spans.append(Run(len(ids)))
            self._append(np.array(ids, np.int64))

    def place(self, shape: MediaShape) -> None:
        """Placeholders of one medium, as many as its tower gives vectors."""
        config = self.config
        sound = audio_tokens(shape.audio_frames) if shape.audio_frames is not None else 0
        if shape.grid is None:
            self.spans.append(Run(sound))
            self.audio_slots.append(self._append(np.full(sound, config.audio_token_index)))
            return
        seen = grid_tokens(shape.grid, config.vision.spatial_merge_size)
        if not sound:
            self.spans.append(Picture(shape.grid, shape.seconds_per_grid))
            index = config.image_token_index if shape.kind == "image" else config.video_token_index
            self.vision_slots.append(self._append(np.full(seen, index)))
            return
        span = HeardVideo(shape.grid, shape.seconds_per_grid, sound)
        self.spans.append(span)
        self._append(np.array([config.audio_start_token_id]))
        slots: dict[bool, list[np.ndarray]] = {False: [], True: []}
        for heard, part in chunks(span, config):
            index = config.audio_token_index if heard else config.video_token_index
            slots[heard].append(self._append(np.full(part.stop - part.start, index)))
        self._append(np.array([config.audio_end_token_id]))
        self.vision_slots.append(np.concatenate(slots[False]))
        self.audio_slots.append(np.concatenate(slots[True]))

    def layout(self) -> Layout:
        return Layout(
            ids=np.concatenate(self.ids),
            positions=positions(self.spans, self.config),
            vision_slots=tuple(self.vision_slots),
            audio_slots=tuple(self.audio_slots),
        )

    def _append(self, ids: np.ndarray) -> np.ndarray:
        """Add ids; their indices."""
        self.ids.append(ids)
        start, self.length = self.length, self.length + len(ids)
        return np.arange(start, self.length)


def _placeholders(tokenizer: Tokenizer, config: ThinkerConfig) -> dict[int, Kind]:
    """The ids that stand for media in the rendered template."""
    places: dict[int, Kind] = {
        config.image_token_index: "image",
        config.audio_token_index: "audio",
        config.video_token_index: "video",
    }
    missing = set(places) - set(tokenizer.special.values())
    if missing:
        raise CheckpointError(
            f"config.json names {min(missing)} as the token of {places[min(missing)]}s, which is "
            "no special token of the tokenizer; take both files from the same checkpoint"
        )
    return places


def _template_mismatch(kind: Kind, what: str) -> CheckpointError:
    return CheckpointError(
        f"the chat template writes {what} places for {kind}s than the conversation has; take the "
        "template from the same checkpoint"
    )
