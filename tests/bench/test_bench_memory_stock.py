"""The official demo's memory, measured on the Thinker of the installed transformers."""

from __future__ import annotations

import pytest

from lowvram.bench.stock import CARD_GIB, CARD_MODEL, StockThinker, bytes_per_token, card_bytes
from lowvram.specs import SPECS

TOKENS = {15: 11_715, 30: 23_430, 60: 46_860}


@pytest.mark.oracle
def test_the_published_peaks_are_found_again() -> None:
    thinker = StockThinker(SPECS[CARD_MODEL].raw)
    for seconds, tokens in TOKENS.items():
        peak, card = thinker.peak(tokens), card_bytes(CARD_MODEL, seconds)
        assert card is not None
        assert peak.measured_peak_bytes == pytest.approx(card, rel=0.05)
        # Nothing but what is named is there: positions are 24 bytes a token.
        assert peak.measured_peak_bytes == peak.predicted_peak_bytes + 24 * tokens


def test_each_token_costs_what_is_kept_of_it() -> None:
    text = SPECS[CARD_MODEL].config.thinker.text
    assert bytes_per_token(text) == {
        "logits": 297 << 10,
        "hidden states": 203 << 10,
        "keys and values": 56 << 10,
    }


def test_the_card_is_of_one_model_and_three_lengths() -> None:
    assert {s: card_bytes(CARD_MODEL, s) for s in CARD_GIB} == {
        15: 12_637_941_268,
        30: 19_155_554_140,
        60: 32_545_114_685,
    }
    assert card_bytes(CARD_MODEL, 20) is None and card_bytes("Qwen2.5-Omni-7B", 15) is None
