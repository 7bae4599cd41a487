"""The counter of recalled facts of ``benchmarks/exp_peft_full.py`` on stubs, and its cipher."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from minisft.model import CausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import peft_full_data as facts_lab


class Lookup(torch.nn.Module):
    """A stub with a model's parts: it is sure of the right next token of the facts that it knows, and else of some digit."""

    def __init__(self, known: int, digits: list[int]) -> None:
        super().__init__()
        self.digits, self.known, self.lm_head = digits, known, torch.nn.Linear(258, 258, bias=False)
        self.lm_head.weight.data = 60.0 * torch.eye(258)

    def hidden(self, input_ids: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        states = torch.zeros(*input_ids.shape, 258)
        states[..., self.digits] = 1.0
        after = torch.roll(input_ids, -1, 1)
        for row in range(min(self.known, len(input_ids))):
            states[row] = torch.nn.functional.one_hot(after[row], 258)
        return states


@pytest.mark.slow
def test_the_counter_reads_nothing_from_an_untrained_model_and_everything_from_a_lookup(tmp_path: Path) -> None:
    tokenizer = facts_lab.own_tokenizer(tmp_path / "tokenizer")
    rows = facts_lab.encode_facts(tokenizer, facts_lab.facts(40, 1))
    model = CausalLM(facts_lab.own_config(True))
    facts_lab.start_small_(model, 0)
    assert facts_lab.recalled_bits(model, rows, tokenizer.pad_id) < 0.01 * 40 * facts_lab.BITS_A_FACT
    digits = tokenizer.encode("0123456789")
    for known in (40, 13, 0):
        found = facts_lab.recalled_bits(Lookup(known, digits), rows, tokenizer.pad_id)  # type: ignore[arg-type]
        assert found == pytest.approx(known * facts_lab.BITS_A_FACT, abs=1e-3)
    assert math.isclose(facts_lab.BITS_A_FACT, 16.6096, rel_tol=1e-4)


def test_the_cipher_replaces_every_letter_and_can_be_undone() -> None:
    text = "The quick brown fox jumps over the lazy dog, 42 times."
    changed = facts_lab.cipher(text)
    pairs = {(a, b) for a, b in zip(text, changed, strict=True)}
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert sum(a != b for a, b in pairs if a.isalpha()) > 20
    assert all(a == b for a, b in pairs if not a.isalpha())
    assert [c.isupper() for c in text] == [c.isupper() for c in changed]
