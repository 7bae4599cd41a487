"""A whole selection, from a file to a file: what the command ``select`` does, as one Python call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from minisft.common.atomic_files import disk_errors
from minisft.common.errors import UserError, visible
from minisft.common.safe_json import JSON
from minisft.quality.pool import read_pool
from minisft.selection.model_scores import ModelSettings, model_scores, scores_name, token_sizes, word_sizes
from minisft.selection.outputs import OutputFiles, write_selection
from minisft.selection.scores import RowScore
from minisft.selection.select import Selection, clean, pick
from minisft.selection.settings import Settings


def _quiet(text: str) -> None:
    pass


def select_rows(
    data: str | Path,
    out: str | Path,
    settings: Settings,
    model: ModelSettings | None = None,
    *,
    against: Sequence[str] = (),
    mapping: Sequence[str] = (),
    reuse: str | Path | None = None,
    log: Callable[[str], None] = _quiet,
) -> Selection:
    """Pick rows of ``data`` and write them to ``out``, with report, scores and page beside it.

    Args:
        data: the pool.
        out: a new file that ends in ``.jsonl``.
        settings: what to drop, how to score, how many to pick.
        model: whose tokens, losses and states to use; without one, words.
        against: test files whose rows must not be picked.
        mapping: ``FIELD=COLUMN`` pairs for the pool and the test files.
        reuse: the ``.scores.jsonl`` of an earlier selection.
        log: told each step.

    Returns:
        the selection.

    Raises:
        UserError: settings, rows, scores or a model that cannot be used; ``disk/...``.
    """
    files = OutputFiles.beside(Path(out))
    if settings.needs_model and model is None:
        what, fix = "this score is a model's", "--model M, or --score length, random or column:NAME"
        raise UserError("config/usage", what, where="minisft select", found=f"--score {visible(settings.score)}", fix=fix)
    pool = read_pool(str(data), mapping)
    tests = [read_pool(path, mapping) for path in dict.fromkeys(against)]
    sizes = token_sizes(pool, model.model, model.template) if model is not None else word_sizes(pool)
    chosen = clean(pool, settings, sizes, tests, log)
    name: dict[str, JSON] = {"settings": dict(vars(settings)), "against": [{t.path: t.dataset.sha256} for t in tests]}
    scores: dict[int, RowScore] = {}
    collected = None
    with disk_errors(files.rows.parent):
        if model is not None and (settings.needs_model or settings.needs_states):
            earlier = Path(reuse) if reuse is not None else None
            scores, collected = model_scores(pool, chosen.alive(), model, settings, files.partial, earlier, log)
        pick(chosen, scores, log)
        name |= scores_name(pool, model, settings) if model is not None else {"data_sha256": pool.dataset.sha256}
        write_selection(files, chosen, scores, name)
        if collected is not None:
            collected.remove()
    return chosen
