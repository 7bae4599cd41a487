"""Keys and values of what was read and written: a request that begins like an earlier one computes only what is new.

The next turn of a chat begins with all turns before it, and requests of one program often share a long system message. Keys and
values of a token depend on the tokens before it alone, so they hold for every row of the same model that begins with the same
ids. Rows are kept as they end; the least recently used give way, and a row that goes on from another one takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.model import CausalLM, KVCache

MIN_SHARED = 32  # tokens: to read fewer again, together with other prompts, costs less than to read the rest alone
MAX_KEPT_ROWS = 256  # each request is compared with all of them


@dataclass(frozen=True, eq=False)
class _Kept:
    model: CausalLM
    ids: Tensor  # (N,) int64, on the CPU
    cache: KVCache  # one row of N tokens


class PrefixCache:
    """Rows of all models of a server, within a limit of memory. Not safe for threads: one thread owns it.

    Args:
        max_bytes: of keys and values; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: list[_Kept] = []  # the one that was used last stands last

    @property
    def num_bytes(self) -> int:
        """What is kept."""
        return sum(_num_bytes(row.cache) for row in self._rows)

    def find(self, model: CausalLM, prompt: Sequence[int]) -> KVCache | None:
        """The longest known prefix of a prompt, without its last token: that one's hidden state is asked for.

        Args:
            model: whose keys and values.
            prompt: token ids.

        Returns:
            one row, a view; None where fewer than ``MIN_SHARED`` tokens are known.
        """
        if len(prompt) <= MIN_SHARED:
            return None
        ids = torch.tensor(prompt[:-1])
        found = [(_num_common(row.ids, ids), i) for i, row in enumerate(self._rows) if row.model is model]
        shared, i = max(found, default=(0, 0))
        if shared < MIN_SHARED:
            return None
        self._rows.append(self._rows.pop(i))
        return self._rows[-1].cache.part(0, shared)

    def keep(self, model: CausalLM, ids: Sequence[int], row: KVCache) -> None:
        """Copy what a row has read and written, unless it is too short, or larger than all memory here.

        Args:
            model: whose keys and values.
            ids: N token ids; models that transformers computes have no keys and values here, and are left out.
            row: one row of N tokens, no more.
        """
        if type(model) is not CausalLM or len(ids) < MIN_SHARED or _num_bytes(row) > self._max_bytes:
            return
        tokens = torch.tensor(ids)
        known = [(_num_common(kept.ids, tokens), kept) for kept in self._rows if kept.model is model]
        if any(shared == len(tokens) for shared, _ in known):
            return
        replaced = {id(kept) for shared, kept in known if shared == len(kept.ids)}
        self._rows = [kept for kept in self._rows if id(kept) not in replaced]
        sizes = [_num_bytes(kept.cache) for kept in self._rows]
        while sum(sizes) + _num_bytes(row) > self._max_bytes or len(sizes) >= MAX_KEPT_ROWS:
            sizes.pop(0)
        self._rows = self._rows[len(self._rows) - len(sizes) :]
        made = model.new_cache(1, len(tokens))
        made.put_(0, row)
        self._rows.append(_Kept(model, tokens, made))


def _num_bytes(cache: KVCache) -> int:
    return cache.keys.nbytes + cache.values.nbytes


def _num_common(a: Tensor, b: Tensor) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    different = (a[:length] != b[:length]).nonzero()
    return int(different[0]) if len(different) else length
