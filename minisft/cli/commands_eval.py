"""``minisft eval``: one metric or several on rows with a known answer, or the suite of general ability."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.cli.commands_answers import load_adapted
from minisft.cli.libraries import load_libraries
from minisft.common.errors import UserError, nearest, visible

if TYPE_CHECKING:
    from minisft.common.safe_json import JSON
    from minisft.data.examples import Example


def eval_command(arguments: argparse.Namespace) -> int:
    """Score a model, and write the scores and every row."""
    if arguments.suite is not None:
        return _suite(arguments)
    for flag in ("data", "metric"):
        if not getattr(arguments, flag):
            what = f"the following arguments are required: --{flag}"
            raise UserError("config/usage", what, where="minisft eval", fix="minisft eval --help")
    return _rows(arguments)


def _rows(arguments: argparse.Namespace) -> int:
    load_libraries()
    from minisft.data.messages import read_dataset
    from minisft.evaluation.results import write
    from minisft.evaluation.several import evaluate_all

    dataset = read_dataset(arguments.data, tuple(arguments.map), keep_duplicates=True)
    clusters = None if arguments.cluster is None else _clusters(dataset.examples, arguments.cluster, arguments.data)
    model, tokenizer, template = load_adapted(arguments)
    for note in (*dataset.notes, *tokenizer.notes):
        print(note)
    results = evaluate_all(
        model,
        tokenizer,
        template,
        dataset.examples,
        arguments.metric,
        clusters=clusters,
        bleu_tokenize=arguments.bleu_tokenize,
        normalize=arguments.normalize,
        max_new_tokens=arguments.max_new_tokens,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        system=arguments.system,
    )
    form: dict[str, JSON] = {
        "form": f"{Path(arguments.data).stem}/chat",
        "data_sha256": dataset.sha256,
        "template_sha256": template.sha256,
        "decoding": f"greedy, at most {arguments.max_new_tokens} tokens",
    }
    out = Path(arguments.out)
    for name, result in results.items():
        if longer := result.extra.get("longer_than_context"):
            dropped = result.extra["dropped_for_context"]
            print(f"{longer} rows are longer than the model's context: {dropped} of them dropped, the others' prompts cut")
        path = out if len(results) == 1 else out.with_name(f"{out.stem}.{name}.json")
        rows = write(replace(result, extra={**result.extra, **form}), path)
        print(f"{name} {result}; {visible(path)}, rows in {visible(rows)}")
        for key in ("signature", "warnings"):
            if key in result.extra:
                print(f"  {key}: {visible(json.dumps(result.extra[key]), 300)}")
    return 0


def _clusters(examples: tuple[Example, ...], column: str, path: str) -> list[str]:
    """The value of a column for each row."""
    for example in examples:
        if column not in example.reference:
            where, known = f"{visible(path)}: row {example.row}", list(example.reference)
            fix = nearest(column, known) or "name a column of --data"
            raise UserError("config/no-column", "there is no such column", where=where, found=visible(column), fix=fix)
    return [json.dumps(example.reference[column], sort_keys=True) for example in examples]


def _suite(arguments: argparse.Namespace) -> int:
    for flag in ("data", "metric"):
        if getattr(arguments, flag):
            fix = f"drop --{flag}, or drop --suite"
            raise UserError("config/usage", "a suite has its own data and metrics", found=f"--{flag}", fix=fix)
    load_libraries()
    from minisft.common.atomic_files import write_durably
    from minisft.evaluation.general_suite import read_suite, run_suite
    from minisft.evaluation.results import write

    data = read_suite(arguments.mmlu, arguments.texts, arguments.limit)
    model, tokenizer, template = load_adapted(arguments)
    base = None
    if arguments.base is not None:
        if data.texts is None:
            raise UserError("config/usage", "KL to the base needs texts", where="--base", fix="give --texts F with {text} rows")
        given = argparse.Namespace(**{**vars(arguments), "model": arguments.base, "adapter": None, "scale": 1.0})
        base = load_adapted(given, writes=False)[0]
    results = run_suite(model, tokenizer, template, data, base, print)
    out, heads = Path(arguments.out), dict[str, "JSON"]()
    for name, result in results.items():
        rows = write(result, out.with_name(f"{out.stem}.{name}.json"))
        heads[name] = {**result.head, "rows": rows.name}
    write_durably(out, (json.dumps({"suite": arguments.suite, **heads}, indent=2, ensure_ascii=False) + "\n").encode())
    print(visible(out))
    return 0
