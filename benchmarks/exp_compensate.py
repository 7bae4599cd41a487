"""Which way of merging back into 4 bits keeps the adapter? SmolLM2-135M in NF4, a LoRA on the parcel task, every way measured.

    python benchmarks/exp_compensate.py                    # trains the adapter first: 10 minutes on one core
    python benchmarks/exp_compensate.py --adapter RUN/adapter

The yardstick is the unmerged model. ``task``: held-out parcel messages; ``other``: text that neither training nor calibration
had. KL(unmerged || merged) in nats a token, at the answers' tokens for ``task``. Results: benchmarks/results/compensate.json
and compensate.svg.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import out_folder, provenance, save, save_svg
from torch import Tensor

from minisft.config import QuantConfig, RunConfig
from minisft.data.chat import Encoded, resolve_template
from minisft.data.encoding import encode_dataset
from minisft.data.messages import Example, read_dataset
from minisft.data.template import ChatTemplate
from minisft.data.tokenizer import Tokenizer
from minisft.evaluation.evaluate import evaluate
from minisft.formats import load_adapter_, load_model
from minisft.kernels import cpu_nf4
from minisft.merge_weights import merge
from minisft.merging.certificate import SENTENCES, kl_divergence
from minisft.merging.compensate import compensate_layer, requantize_compensated
from minisft.merging.grid_codes import output_error
from minisft.model import CausalLM
from minisft.nf4 import QuantizedWeight, decode_absmax, pack, quantize_absmax
from minisft.nf4_linear import NF4Linear
from minisft.quickstart.run import MODEL, write_data
from minisft.surgery import adapters_off, lora_modules, nf4_modules, replace_module, weight_bytes
from minisft.training.train import train

STEPS, TASK_ROWS, TEST_ROWS, SEED = 40, 24, 24, 0
ANSWERING = ("plain", "dither", "both")
SHRINKS = [0.80 + 0.025 * k for k in range(10)]  # of a block's scale, up to 1.025
Way = Callable[[], tuple[CausalLM, dict]]  # a model, and what is known of its layers


class Bench:
    """The model, its data, and what every way needs."""

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        write_data(folder, SEED, 400, TEST_ROWS)
        adapter = adapter or trained(folder)
        self.model, self.tokenizer = load_model(MODEL, torch.float32, quant=QuantConfig())
        load_adapter_(self.model, adapter)
        self.model.eval()
        self.template = resolve_template(self.tokenizer)
        self.examples = read_dataset(folder / "test.jsonl").examples
        task = encoded(read_dataset(folder / "train.jsonl").examples[:TASK_ROWS], self.tokenizer, self.template)
        general = encoded(read_dataset(folder / "general.jsonl", keep_duplicates=True).examples, self.tokenizer, self.template)
        self.calibration = [row.input_ids for row in (*task, *general)]
        self.texts = {
            "task": [supervised(row) for row in encoded(self.examples, self.tokenizer, self.template)],
            "other": [(ids, list(range(len(ids) - 1))) for ids in map(self.tokenizer.encode, SENTENCES)],
        }
        self.wanted = {name: logits(self.model, rows) for name, rows in self.texts.items()}

    @functools.cached_property
    def moments(self) -> dict[str, Tensor]:
        """H of every adapted layer on its inputs in the unmerged model."""
        return moments(self.model, self.calibration)


def trained(folder: Path) -> Path:
    run = RunConfig(
        model=MODEL, data=str(folder / "train.jsonl"), out=str(folder / "run"), batch_size=8, lr=8e-4, dtype="fp32",
        packing=True, steps=STEPS, eval_every=STEPS, quant="nf4", seed=SEED,
    )  # fmt: skip
    result = train(run)
    assert result.weights is not None
    return result.weights


def encoded(examples: Sequence[Example], tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Encoded, ...]:
    return encode_dataset(examples, tokenizer, template, 1024).rows


def supervised(row: Encoded) -> tuple[list[int], list[int]]:
    return row.input_ids, [i - 1 for i, wanted in enumerate(row.supervised) if wanted and i > 0]


@torch.inference_mode()
def logits(model: CausalLM, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    return torch.cat([model.head(model.hidden(torch.tensor([ids]))[0, places]) for ids, places in rows])


@torch.no_grad()
def moments(model: CausalLM, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """X^T X / N of every adapted layer, computed once for neighbours with one input."""
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def hook(path: str) -> Callable[..., None]:
        def add(_: object, args: tuple[Tensor, ...]) -> None:
            if args[0] is not last[0]:
                x = args[0].reshape(-1, args[0].shape[-1])
                last[:] = args[0], x.T @ x
            sums[path] = sums.get(path, 0) + last[1]

        return add

    hooks = [adapter.register_forward_pre_hook(hook(path)) for path, adapter in lora_modules(model).items()]
    for ids in rows:
        model.hidden(torch.tensor([ids]))
    for handle in hooks:
        handle.remove()
    return {path: total / sum(map(len, rows)) for path, total in sums.items()}


# ---- the ways --------------------------------------------------------------------------------------------------------


def ways(bench: Bench) -> dict[str, Way]:
    def compensated(way: str) -> tuple[CausalLM, dict]:
        merged, report = requantize_compensated(bench.model, bench.calibration, way)
        return merged, {
            "output_errors": [layer.output_error for layer in report.layers],
            "plain_output_errors": [layer.plain_output_error for layer in report.layers],
            "survival": [layer.effect.survival for layer in report.layers],
            "moved": [layer.moved for layer in report.layers],
        }

    def plain() -> tuple[CausalLM, dict]:
        merged, report = merge(bench.model, "requantized")
        return merged, {"survival": [layer.survival for layer in report.layers]}

    def by_layer(choose: Callable[[str, QuantizedWeight], QuantizedWeight]) -> tuple[CausalLM, dict]:
        merged, _ = merge(bench.model, "requantized")
        errors = []
        for path, layer in nf4_modules(merged).items():
            q = choose(path, layer.quantized)
            replace_module(merged, path, NF4Linear(q, layer.bias).eval())
            errors.append(relative_error(bench, path, q))
        return merged, {"output_errors": errors}

    return {
        "plain": plain,
        "dither": lambda: compensated("stochastic"),
        "feedback": lambda: compensated("gptq"),
        "both": lambda: compensated("both"),
        "scales": lambda: by_layer(lambda path, q: best_scales(bench, path)),
        "feedback, inputs of the unmerged model": lambda: by_layer(
            lambda path, q: compensate_layer(path, lora_modules(bench.model)[path], q, bench.moments[path], "gptq")[0]
        ),
        "descent": lambda: compensated("descent"),
    }


def wanted_weight(bench: Bench, path: str) -> Tensor:
    adapter = lora_modules(bench.model)[path]
    return adapter.base.dequantized_weight(torch.float32) + adapter.delta_weight()


def relative_error(bench: Bench, path: str, q: QuantizedWeight) -> float:
    """|X (W' - W - D)^T| / |X D^T| on the unmerged model's inputs."""
    error = cpu_nf4.dequantize(q, torch.float32) - wanted_weight(bench, path)
    delta, H = lora_modules(bench.model)[path].delta_weight(), bench.moments[path]
    return float(output_error(error.T, H).sum() / output_error(delta.T, H).sum()) ** 0.5


def best_scales(bench: Bench, path: str) -> QuantizedWeight:
    """Nearest codes; each block's scale is the one of ``SHRINKS`` with the least e H e^T over the block's own inputs."""
    q, weight = lora_modules(bench.model)[path].base.quantized, wanted_weight(bench, path)
    O, I, G = *weight.shape, q.block_size  # noqa: E741
    blocks = weight.view(O, I // G, G)
    H = torch.stack([bench.moments[path][g : g + G, g : g + G] for g in range(0, I, G)])
    largest = blocks.abs().amax(-1)
    costs = []
    for shrink in SHRINKS:
        scale = (largest * shrink).clamp(min=1e-12)[..., None]
        error = nearest_values(blocks / scale, q.levels)[1] * scale - blocks
        costs.append((torch.einsum("obg,bgh->obh", error, H) * error).sum(-1))
    scales = largest * torch.tensor(SHRINKS)[torch.stack(costs).argmin(0)]
    absmax, absmax2, offset = quantize_absmax(scales.flatten())
    stored = QuantizedWeight(q.packed, absmax, absmax2, offset, q.levels, G, q.shape, q.dtype)
    codes, _ = nearest_values(blocks / decode_absmax(stored).view(O, -1, 1), q.levels)
    return QuantizedWeight(pack(codes.flatten()), absmax, absmax2, offset, q.levels, G, q.shape, q.dtype)


def nearest_values(scaled: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8), levels[codes]


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(bench: Bench, model: CausalLM, answers: bool) -> dict:
    found: dict = {"bytes": weight_bytes(model)}
    for name, rows in bench.texts.items():
        given = logits(model, rows)
        found[f"kl_{name}"] = float(kl_divergence(bench.wanted[name], given).mean())
        found[f"same_choice_{name}"] = float((bench.wanted[name].argmax(1) == given.argmax(1)).double().mean())
        targets = torch.tensor([ids[place + 1] for ids, places in rows for place in places])
        found[f"loss_{name}"] = float(torch.nn.functional.cross_entropy(given, targets))
    if answers:
        result = evaluate(
            model, bench.tokenizer, bench.template, bench.examples, "json", max_new_tokens=48, batch_size=TEST_ROWS
        )  # fmt: skip
        found |= {"all_right": result.score, "rows": result.n}
    return found


def draw(rows: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    bars, lines = figure.subplots(2, 1)
    draw_divergence(bars, {name: row for name, row in rows.items() if name != "unmerged"})
    feedback = rows["feedback"]
    lines.plot(feedback["plain_output_errors"], ".-", color="#666666", linewidth=0.7, markersize=3, label="plain")
    for name, color in (("descent", "#E69F00"), ("feedback", "#0072B2"), ("both", "#009E73")):
        if name in rows:
            lines.plot(rows[name]["output_errors"], ".-", color=color, linewidth=0.7, markersize=3, label=name)
    lines.set_ylim(bottom=0)
    lines.set_ylabel("|X (W' - W - D)| / |X D|")
    lines.set_xlabel("adapted layer, in the model's order")
    lines.legend(frameon=False, ncols=4)
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    save_svg(figure, path)


def draw_divergence(axes, rows: dict[str, dict]) -> None:
    kinds = (("kl_task", "task", "#0072B2"), ("kl_other", "other text", "#E69F00"))
    for shift, (key, label, color) in enumerate(kinds):
        places = [i + 0.4 * shift for i in range(len(rows))]
        axes.bar(places, [row[key] for row in rows.values()], 0.4, label=label, color=color)
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [name.replace(", ", ",\n") for name in rows], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("KL(unmerged || merged), nats")
    axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="trained before by this script; default: train it now")
    parser.add_argument("--only", nargs="*", help="these ways; the results then go to a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(Bench(Path(name) / "data", arguments.adapter), arguments.only)


def run(bench: Bench, only: list[str] | None) -> None:
    """Every way in turn; what is known is written after each."""
    head = provenance()
    head["calibration_tokens"] = sum(map(len, bench.calibration))
    rows = {"unmerged": measure(bench, bench.model, True)}
    with adapters_off(bench.model):
        rows["base"] = measure(bench, bench.model, False)
    show(rows, "unmerged", "base")
    folder = out_folder(None, bool(only))
    for name, way in ways(bench).items():
        if only and name not in only:
            continue
        began = time.perf_counter()
        merged, layers = way()
        seconds = time.perf_counter() - began
        rows[name] = {**measure(bench, merged, name in ANSWERING), "seconds": seconds, **layers}
        save("compensate", {**head, "ways": rows}, folder)
        show(rows, name)
    if not only:
        draw(rows, folder / "compensate.svg")


def show(rows: dict[str, dict], *names: str) -> None:
    for name in names:
        row = rows[name]
        errors = row.get("output_errors", [float("nan")])
        print(
            f"{name:36} KL task {row['kl_task']:.5f} other {row['kl_other']:.5f}  loss {row['loss_task']:.4f}  "
            f"right {row.get('all_right', float('nan')):.1%}  output error {sum(errors) / len(errors):.3f} "
            f"(max {max(errors):.3f})  {row['bytes'] / 1e6:.2f} MB  {row.get('seconds', 0):.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
