"""How many bits the trained numbers of a run can hold, beside an upper bound of the bits that its rows bring.

A rule of thumb on one side (a language model stores about two bits a parameter), a bound on the other: the answers, compressed,
are a description of all that there is to learn of them, and a model that knows something already has less to learn. So "rank is
not the limit" is a safe sentence, and "rank may be the limit" is a question for a validation loss. No weight is loaded.

The idea to take home: what an adapter must hold is counted in bits, not in rows.

Ref: Allen-Zhu and Li 2024, arXiv:2404.05405, section 1 (two bits a parameter, for knowledge seen often enough).
"""

from __future__ import annotations

import lzma
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from minisft.common.device import pick_device, pick_dtype
from minisft.common.safe_json import JSON
from minisft.config import LoRAConfig, RunConfig
from minisft.data.chat import Encoded
from minisft.data.tokenizer import Tokenizer
from minisft.formats.loading import empty_model
from minisft.formats.source import resolve
from minisft.model import CausalLM
from minisft.surgery import match_targets, num_parameters, pattern_value, train_fully_
from minisft.training.init_adapter import with_adapter_settings
from minisft.training.new_tokens import tokenizer_of_run
from minisft.training.plan import shape_of_run
from minisft.training.run_data import prepare_data

BITS_A_PARAMETER = 2.0
_SLOW_BYTES = 4_000_000  # of text, beyond which the fastest compression has to do


@dataclass(frozen=True)
class Capacity:
    """What is trained, and what it is trained on.

    Attributes:
        method: ``lora`` or ``full``.
        parameters: trained numbers.
        bits: what they hold by the rule of thumb.
        rows, supervised_tokens: of the training rows; None without data.
        token_bits: supervised tokens times log2 of the vocabulary, a bound for any text.
        text_bits: the supervised text, compressed (LZMA); a bound too, and usually far smaller.
    """

    method: str
    parameters: int
    bits: float
    rows: int | None = None
    supervised_tokens: int | None = None
    token_bits: float | None = None
    text_bits: float | None = None

    @property
    def needed(self) -> float | None:
        """The smaller bound of the bits to learn; None without data."""
        return None if self.token_bits is None or self.text_bits is None else min(self.token_bits, self.text_bits)

    @property
    def is_enough(self) -> bool | None:
        """Whether all that there is to learn fits; None without data."""
        return None if self.needed is None else self.needed <= self.bits

    def to_dict(self) -> dict[str, JSON]:
        """All numbers, and the sentence."""
        return {**asdict(self), "needed": self.needed, "is_enough": self.is_enough, "advice": advice(self)}


def capacity(run: RunConfig) -> Capacity:
    """Count what a run trains, and bound what its rows can teach.

    bits = 2 * trained parameters; needed = min(supervised tokens * log2 V, 8 * bytes of the compressed answers).

    Args:
        run: the settings; with an empty ``data`` only the first half is known.

    Returns:
        both.

    Raises:
        UserError: a model or rows that cannot be read, targets or a rank that do not fit.

    Cost: the rows are read and encoded once.
    """
    shape = shape_of_run(run, resolve(run.model))
    model = empty_model(shape.config)
    trained = trained_parameters(run, model, len(shape.row_ids))
    found = Capacity(run.method, trained, BITS_A_PARAMETER * trained)
    if not run.data:
        return found
    context = shape.config.max_position_embeddings
    run = replace(run, dtype=pick_dtype(run.dtype, pick_device(run.device)), max_length=min(run.max_length, context))
    tokenizer, _ = tokenizer_of_run(run)
    _, data = prepare_data(run, tokenizer, lambda text: None, None, context)
    tokens = sum(sum(row.supervised) for row in data.train)
    return replace(
        found, rows=len(data.train), supervised_tokens=tokens, token_bits=tokens * math.log2(shape.config.vocab_size),
        text_bits=compressed_bits(data.train, tokenizer),
    )  # fmt: skip


def trained_parameters(run: RunConfig, model: CausalLM, num_rows: int = 0) -> int:
    """How many numbers a run trains.

    Adapters: sum over layers of rank * (in + out), and out more with DoRA; full: the targets, or everything.

    Args:
        run: the settings.
        model: of the base's shape, on the meta device; changed by ``full``.
        num_rows: trained rows of embedding and head, beside adapters.

    Returns:
        The count.
    """
    if run.method == "full":
        train_fully_(model, None if run.targets is None else run.lora.targets)
        return num_parameters(model, trainable=True)
    config = with_adapter_settings(run, model)[1] if run.init_adapter is not None else run.lora
    rows = num_rows * model.config.hidden_size * (1 if model.config.tie_word_embeddings else 2)
    targets = match_targets(model, config.targets)
    return rows + sum(_adapter_parameters(config, path, tuple(_weight(model, path))) for path in targets)


def _weight(model: CausalLM, path: str) -> Sequence[int]:
    return model.get_parameter(f"{path}.weight").shape


def _adapter_parameters(config: LoRAConfig, path: str, shape: tuple[int, ...]) -> int:
    rank = pattern_value(path, config.rank_pattern, config.rank)
    return rank * sum(shape) + (shape[0] if config.use_dora else 0)


def compressed_bits(rows: Sequence[Encoded], tokenizer: Tokenizer) -> float:
    """Bits of the supervised texts, in a fixed random order, after LZMA: who has the file can write down every answer.

    Cost: about a second a megabyte up to 4 MB, a tenth of that beyond.
    """
    texts = [tokenizer.decode([i for i, on in zip(row.input_ids, row.supervised, strict=True) if on]) for row in rows]
    random.Random(0).shuffle(texts)  # a file sorted by its answers compresses to nothing, but no model sees the order
    text = "\n".join(texts).encode()
    raw = [{"id": lzma.FILTER_LZMA2, "preset": 6 if len(text) <= _SLOW_BYTES else 0}]
    return 8.0 * len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=raw))


# ---- what people read ------------------------------------------------------------------------------------------------


def render(found: Capacity) -> str:
    """Two or three lines, and the sentence."""
    kind = "adapter" if found.method == "lora" else "trained weights"
    lines = [
        f"capacity of the {kind}: about {_bits(found.bits)} ({found.parameters:,} parameters, two bits each: a rule of thumb)"
    ]
    if found.supervised_tokens is not None and found.token_bits is not None and found.text_bits is not None:
        lines.append(
            f"bits to learn: at most {_bits(found.text_bits)} ({found.rows:,} rows, {found.supervised_tokens:,} supervised "
            f"tokens, their text compressed; {_bits(found.token_bits)} if every token were a surprise): an upper bound"
        )
    return "\n".join([*lines, advice(found)])


def advice(found: Capacity) -> str:
    """Whether rank is the limit, in one sentence."""
    limit = "Rank" if found.method == "lora" else "The number of trained weights"
    if found.needed is None:
        return f"Whether {limit.lower()} is the limit depends on the rows: give --data."
    sizes = f"{_bits(found.needed)} at most to learn, about {_bits(found.bits)} of capacity"
    if found.is_enough:
        return f"{limit} is not your limit: {sizes}."
    return f"{limit} may be your limit: {sizes}; compare the validation loss with a higher rank, or with --method full."


def _bits(number: float) -> str:
    """640 bit, 63.2 kbit, 9.8 Mbit."""
    for unit, size in (("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bit"
