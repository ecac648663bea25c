"""A small Thinker, trained on the docstrings of Python's standard library.

It is the package's own `ThinkerText`, with grouped-query attention and the biases of Qwen2.5. The
folder keeps text model and tokens, so that a second run measures the very same weights.
"""

from __future__ import annotations

import ast
import math
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn import functional as F

from lowvram.config import DecoderConfig, ThinkerConfig
from lowvram.models import text
from lowvram.models.linear import dense

VOCABULARY = 2048
LENGTH = 256
"""Tokens of a sequence, in training and in what is measured."""

CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=10_000.0,
    mrope_section=(8, 12, 12),
)

_BATCH = 8
_RATE, _WARM = 3e-3, 40
_HELD_OUT_FILES = 10


@dataclass(frozen=True)
class Trained:
    """Weights in float16 by the checkpoint's names (without `thinker.`), and token ids int64 [N, T]
    of text that was trained on and of text that was not. `loss` is that of the last steps.
    """

    weights: dict[str, Tensor]
    seen: Tensor
    unseen: Tensor
    loss: float

    def layer(self, index: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{index}."
        found = self.weights.items()
        return {k.removeprefix(prefix): v for k, v in found if k.startswith(prefix)}


def trained(folder: Path, steps: int, seed: int) -> Trained:
    """The model that lies in `folder`, or a new one that is put there."""
    path = folder / f"quality-{steps}-{seed}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(vars(_train(steps, seed)), path)
    return Trained(**torch.load(path))


def docstrings() -> Iterator[tuple[bool, str]]:
    """Every docstring of the standard library once, and whether its file is held out."""
    root, known = Path(sysconfig.get_path("stdlib")), set()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests"} & set(place.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            said = ast.get_docstring(node) if isinstance(node, kinds) else None
            if said and said not in known:
                known.add(said)
                yield zlib.crc32(place.as_posix().encode()) % _HELD_OUT_FILES == 0, said


def _tokens() -> tuple[Tensor, Tensor]:
    """Token ids of text to train on and of held-out text, int64 [N, LENGTH + 1]."""
    found = list(docstrings())
    tokenizer = ByteLevelBPETokenizer()
    to_learn = [said for held_out, said in found if not held_out]
    tokenizer.train_from_iterator(to_learn, VOCABULARY, show_progress=False)
    cut = []
    for wanted in (False, True):
        joined = "\n\n".join(said for held_out, said in found if held_out is wanted)
        ids = torch.tensor(tokenizer.encode(joined).ids)
        cut.append(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))
    return cut[0], cut[1]


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """The package's attention writes in place, which cannot be differentiated."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class _NoCache:
    def write(self, index: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


def _train(steps: int, seed: int) -> Trained:
    torch.manual_seed(seed)
    seen, unseen = _tokens()
    model = text.ThinkerText(ThinkerConfig(text=CONFIG), dense)
    embedding = torch.nn.Embedding(VOCABULARY, CONFIG.hidden_size)
    torch.nn.init.normal_(embedding.weight, std=0.5)
    parameters = [*model.parameters(), *embedding.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    rope = model.model.rope(torch.arange(LENGTH).expand(3, 1, LENGTH), torch.float32)
    loss = math.nan
    with patch.object(text, "attention", _attention):
        for step in range(steps):
            ids = seen[torch.randint(len(seen), (_BATCH,))]
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.model(embedding(ids[:, :-1]), rope, _NoCache(), 0)
                scores = model.lm_head(hidden)
            now = F.cross_entropy(scores.float().flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            now.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            fade = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = _RATE * fade * min(1.0, (step + 1) / _WARM)
            optimizer.step()
            loss = now.item() if step == 0 else 0.98 * loss + 0.02 * now.item()
    weights = {name: tensor.detach().half() for name, tensor in model.named_parameters()}
    weights["model.embed_tokens.weight"] = embedding.weight.detach().half()
    return Trained(weights, seen, unseen, loss)
