"""The reply's text, token by token, and the states that its speech is made from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from lowvram.checkpoint import Checkpoint
from lowvram.conversation import Prompt, Tokenizer
from lowvram.engine.context import Context
from lowvram.engine.encode import (
    embed_prompt,
    embed_tokens,
    encode_audio,
    encode_vision,
    media_slots,
)
from lowvram.engine.holder import Holder
from lowvram.engine.thinker import Thinker
from lowvram.models.text import ThinkerText

Draw = Callable[[Tensor], int]
"""The next token of logits [1, V]."""


def dictated(tokens: Sequence[int], end: int) -> Draw:
    """Those tokens and then `end`, whatever the logits are."""
    rest = iter((*tokens, end))
    return lambda logits: next(rest)


class Thinking(Holder):
    """The Thinker while it answers one prompt; what it holds on the device goes when it is left.

        with Thinking(...) as thinking:
            states = thinking.read()
            for step in thinking.steps(draw, needed): ...

    `tokens` takes those that are drawn, with the one that ends the reply.
    """

    def __init__(
        self,
        context: Context,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        prompt: Prompt,
        tokens: list[int],
        *,
        max_new_tokens: int,
        speaks: bool,
    ) -> None:
        super().__init__(context)
        self._checkpoint, self._tokenizer = checkpoint, tokenizer
        self._prompt, self._limit, self._speaks = prompt, max_new_tokens, speaks
        self._thinker: Thinker | None = None
        self._logits: Tensor | None = None
        self.tokens = tokens

    def _forget(self) -> None:
        self._thinker = self._logits = None

    def read(self) -> Tensor | None:
        """Run the media and the prompt.

        Returns:
            Where the reply is spoken, [T, E] on the host in the compute type: each prompt token's
            last hidden state plus its embedding, which is left out where a medium stands.
        """
        context, prompt, config = self._context, self._prompt, self._checkpoint.config.thinker
        embeds = embed_prompt(context, prompt)
        states = torch.empty_like(embeds) if self._speaks else None
        with context.carried("prompt", *(t for t in (embeds, states) if t is not None)):
            if prompt.vision:
                encode_vision(context, prompt, embeds)
            if prompt.audio:
                encode_audio(context, prompt, embeds, config.audio)
            with context.phase("prefill"):
                model = self._stack.enter_context(context.use("text", ThinkerText))
                cache = self._stack.enter_context(
                    context.kv_cache("thinker", "text", config.text, len(prompt.ids) + self._limit)
                )
                self._thinker = Thinker(context, model, cache, context.plan.chunks["text"])
                self._logits = self._thinker.prefill(embeds, prompt.positions, states)
            if states is None:
                return None
            embeds.index_fill_(0, media_slots(prompt).to(context.host), 0)
            return states.add_(embeds)

    def steps(self, draw: Draw, needed: Callable[[], bool]) -> Generator[str | Tensor, None, None]:
        """Text as soon as it is drawn, and after each token that is fed back its state [1, E] (its
        last hidden state plus its embedding, on the host), where the reply is spoken.

        The token that ends the reply is kept, but not written, and no state follows it. Once
        neither logits nor states are `needed` tokens are drawn without the Thinker.
        """
        context, thinker, logits = self._context, self._thinker, self._logits
        assert thinker is not None and logits is not None
        self._logits = None
        ends = self._checkpoint.generation.eos_token_ids
        words = self._tokenizer.stream()
        while True:
            with context.phase("decode", stepwise=True):
                token = draw(logits)
            self.tokens.append(token)
            if token in ends:
                break
            if piece := words.push(token):
                yield piece
            if len(self.tokens) == self._limit:
                break
            if not needed():
                continue
            embed = embed_tokens(context, [token])
            position = self._prompt.next_position + len(self.tokens) - 1
            with context.phase("decode", stepwise=True):
                logits, hidden = thinker.step(embed, position)
                state = context.to_host(hidden) + embed if self._speaks else None
            if state is not None:
                self._keep("logits", [logits])  # while others compute
                yield state
                self._let_go("logits")
        if piece := words.finish():
            yield piece
