"""Typed, frozen settings, checked at birth.

``ModelConfig`` says what a decoder is, ``LoRAConfig`` what an adapter is, ``QuantConfig`` how a frozen base is stored in 4
bits, ``RunConfig`` what one training run does. A command-line flag, a key in a TOML file and a field of ``RunConfig`` are
one and the same thing: the command line is generated from the fields, so they cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Literal

from minisft.common.checks import require
from minisft.common.errors import nearest
from minisft.common.model_checks import check_model
from minisft.common.settings import (
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    Allowed,
    check_fields,
    config_of,
    flag,
    flag_name,
)
from minisft.data.sources import parse_sources

ALL_LINEAR = "all-linear"
# Fields of ModelConfig that Llama, Mistral, Qwen2 and Qwen3 leave at their defaults.
_SWITCHES = (
    "nope_layers", "global_layers", "local_rope_theta", "qk_norm_flat", "norms", "norm_plus_one", "activation",
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_divisor", "logits_softcap",
)  # fmt: skip
# How an answer is judged: by ``minisft eval``, and by a run that validates with ``eval_metric``.
EVAL_METRICS = ("exact_match", "json", "f1", "label", "bleu", "chrf", "rouge", "choice", "loss", "bits_per_byte")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
QUANT_LEVELS = ("nf4", "fp4", "int4")
QUANT_BLOCK_SIZES = tuple(2**k for k in range(5, 13))  # 32 to 4096


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent stretching of RoPE (arXiv:2407.21783, section 3.4; ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; ``model_type`` is Hugging Face's word, and what it means for the arithmetic stands in the rest.

    Args:
        nope_layers, global_layers: which layers (0 is the first) have no RoPE, and which ignore ``sliding_window``.
        local_rope_theta: RoPE's base, never scaled, in the layers with a window; None for ``rope_theta`` everywhere.
        qk_norm, qk_norm_flat: a norm on q and k, over each head or over all heads together.
        norms: where a layer's norms stand, before attention and MLP, after them, or both; they multiply by weight + 1 with
            ``norm_plus_one``.
        attention_multiplier: of q k^T; None for 1 / sqrt(head_dim).
        logits_divisor, logits_softcap: logits = cap * tanh(head(hidden) / divisor / cap).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    nope_layers: tuple[int, ...] = ()
    global_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    qk_norm_flat: bool = False
    norms: Literal["before", "after", "both"] = "before"
    norm_plus_one: bool = False
    activation: Literal["silu", "gelu"] = "silu"
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None

    def __post_init__(self) -> None:
        check_model(self)

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer may see, itself included; None for all."""
        return None if layer in self.global_layers else self.sliding_window

    @property
    def switches(self) -> dict[str, typing.Any]:
        """What differs from Llama, Mistral, Qwen2 and Qwen3, by field: without it the model is another one."""
        found = {name: getattr(self, name) for name in _SWITCHES}
        return {name: value for name, value in found.items() if value != getattr(ModelConfig, name)}


@dataclass(frozen=True)
class LoRAConfig:
    """What adapters to add, and where.

    W' = W + scaling * B A, with scaling = alpha / rank, or alpha / sqrt(rank) with ``use_rslora``.

    Args:
        rank: inner dimension of the factors.
        alpha: numerator of the scaling.
        dropout: probability of zeroing an input of ``lora_A`` in training, in [0, 1).
        use_rslora: rank-stabilised scaling (arXiv:2312.03732).
        targets: ``"all-linear"`` (every linear but the output head), a tuple of module names (each matches exactly, or
            as the last parts of a path), or a string: a regular expression that the whole path must match.
        rank_pattern, alpha_pattern: exceptions, module name or regular expression -> value, as in PEFT.
        use_dora: train the length of each row of W' apart from its direction (arXiv:2402.09353); linears only, no dropout.
        init: how the factors start: ``default`` (B is zero) or ``pissa`` (the principal part of W, arXiv:2404.02948; dense
            linears only).

    Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    use_rslora: bool = False
    targets: str | tuple[str, ...] = ALL_LINEAR
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    init: Literal["default", "pissa"] = "default"

    def __post_init__(self) -> None:
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            require(rank >= 1, name, rank, "a rank of at least 1")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            require(math.isfinite(alpha), name, alpha, "a finite alpha")
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "a probability in [0, 1)")
        require(self.dropout == 0.0 or not self.use_dora, "dropout with use_dora", self.dropout, "0: DoRA has no dropout here")
        if self.init == "pissa":
            require(not self.use_dora, "init pissa with use_dora", self.use_dora, "plain LoRA", "leave one of them away")
            for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
                require(alpha > 0, f"init pissa with {name}", alpha, "a positive alpha", "take alpha = rank for scaling 1")
        require(bool(self.targets), "targets", self.targets, "at least one module name")


@dataclass(frozen=True)
class QuantConfig:
    """Which frozen layers are stored in 4 bits, and how. ``nf4.quantize`` explains the numbers.

    Args:
        levels: the codebook: ``nf4``, ``fp4`` or ``int4``.
        block_size: weights that share a scale, one of ``QUANT_BLOCK_SIZES``.
        double_quant: store the scales in 8 bits too.
        targets: as in ``LoRAConfig``; by default every linear but the output head. Embeddings stay dense.

    Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
    """

    levels: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    targets: str | tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        require(self.levels in QUANT_LEVELS, "levels", self.levels, " or ".join(QUANT_LEVELS))
        sizes = ", ".join(map(str, QUANT_BLOCK_SIZES))
        require(self.block_size in QUANT_BLOCK_SIZES, "block_size", self.block_size, f"one of {sizes}")
        require(bool(self.targets), "targets", self.targets, "at least one module name")


# What an adapter of ``init_adapter`` decides, and otherwise these defaults, in the order of ``RunConfig.lora``.
_ADAPTER_DEFAULTS: dict[str, typing.Any] = {
    "rank": 16, "alpha": 32.0, "use_rslora": False, "use_dora": False, "targets": (ALL_LINEAR,),
}  # fmt: skip
_ADAPTER_ONLY = ("rank", "alpha", "dropout", "use_rslora", "use_dora", "init", "lr_b_ratio")  # no part of --method full


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides one training run. Each field is a flag of ``minisft train`` and a key of ``--config``."""

    model: str = flag("model folder, GGUF file, hub id or smollm2-135m-instruct", metavar="M")
    data: str | tuple[str, ...] = flag(
        "training rows: JSONL, JSON, CSV, Parquet, hf:org/name[:config][@revision][#split]; several are read as one, or mixed "
        "by their shares of an epoch's rows: a.jsonl:0.7 b.jsonl:0.3",
        metavar="F[:SHARE]",
    )
    out: str = flag("run folder: new, or with --resume the one to go on with", metavar="DIR")
    eval_data: str | None = flag("validation rows; without it a share of --data is held out", None, "F")
    validation_share: float = flag("share of --data held out when there is no --eval-data", 0.05, allowed=BELOW_1)
    replay: str | None = flag(
        "rows that keep what the model knows, mixed into every step: any form of rows, or plain text in a column text",
        None,
        "F",
    )
    replay_share: float | None = flag(
        "share of each step's rows that come from --replay (default 0.1)",
        None,
        allowed=Allowed(lambda value: 0 < value < 1, "a share in (0, 1)"),
        fix="0.05 to 0.2 is usual; leave --replay away for none",
    )
    map: tuple[str, ...] = flag(
        "column of your file for a field of ours, e.g. prompt=question (repeatable)", (), "FIELD=COLUMN"
    )
    template: str | None = flag("chat template instead of the model's own: a .jinja file, chatml or plain", None, "T")
    turns: Literal["all", "last"] = flag("which assistant turns are trained", "all")
    max_length: int = flag(
        "longest row in tokens; longer prompts are cut from the left, and rows whose answers do not fit are dropped",
        1024,
        "N",
        allowed=Allowed(lambda value: value >= 8, "at least 8 tokens"),
    )
    strict: bool = flag("stop at rows that are too long instead of counting and dropping them", False)
    allow_control_tokens: bool = flag("let control tokens that stand in the data act as such (default: they are text)", False)
    packing: bool = flag(
        "padding-free batches: rows one after the other, a prefix that all share computed once; same result as padded", True
    )
    method: Literal["lora", "full"] = flag("train adapters, or the weights themselves (all, or those of --targets)", "lora")
    init_adapter: str | None = flag("start from this adapter; rank, alpha, targets and form are its own", None, "DIR")
    rank: int | None = flag("LoRA rank (default 16)", None, "R")
    alpha: float | None = flag("LoRA alpha; the update is scaled by alpha / rank (default 32)", None)
    dropout: float = flag("LoRA dropout in [0, 1)", 0.0, "P")
    use_rslora: bool | None = flag("scale by alpha / sqrt(rank) (default no)", None)
    use_dora: bool | None = flag("DoRA: train the length of each weight row apart from its direction (default no)", None)
    targets: tuple[str, ...] | None = flag(
        "module names or one regular expression (default for lora all-linear: every linear but the head; for full every "
        "weight)",
        None,
        "NAME",
    )
    init: Literal["default", "pissa"] = flag(
        "how adapters start: default (they change nothing), or pissa (with the principal part of each weight; saved as plain "
        "LoRA of twice the rank)",
        "default",
    )
    add_tokens: str | None = flag(
        "new tokens, one a line (or .json: a list): each gets a row in embedding and head, and goes with the adapter", None, "F"
    )
    train_tokens: Literal["new", "all"] = flag(
        "with --add-tokens: which rows of embedding and head are trained beside the adapters; all makes large adapters", "new"
    )
    quant: Literal["none", "nf4"] = flag("quantize the frozen base to 4 bits and train adapters on it (QLoRA)", "none")
    double_quant: bool = flag("with --quant: store the scales of the 4-bit blocks in 8 bits too", True)
    steps: int | None = flag("optimizer steps (or give --epochs)", None, "N", allowed=AT_LEAST_1)
    epochs: float | None = flag("passes over the data (default 1)", None, "N", allowed=POSITIVE)
    batch_size: int = flag("rows in an optimizer step", 8, "N", allowed=AT_LEAST_1)
    micro_batch_size: int | None = flag(
        "rows computed at once (default: the whole batch); never changes the result", None, "N", allowed=AT_LEAST_1
    )
    lr: float | None = flag("peak learning rate (default 2e-4 for lora, 2e-5 for full)", None, allowed=POSITIVE)
    lr_b_ratio: float = flag(
        "LoRA+: learning rate of lora_B over that of lora_A, which is --lr; the paper suggests 16 with a smaller --lr",
        1.0,
        "R",
        allowed=POSITIVE,
        fix="1 is LoRA, 16 is what LoRA+ suggests",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = flag(
        "learning rate after the warm-up; wsd stays at the peak and comes down at the end", "cosine"
    )
    decay_share: float | None = flag(
        "with --schedule wsd: share of the steps that come down (default 0.2)",
        None,
        allowed=Allowed(lambda value: 0 < value <= 1, "a share in (0, 1]"),
        fix="0.1 to 0.2 is usual",
    )
    warmup: float = flag(
        "share of the steps that warm up", 0.03, allowed=Allowed(BELOW_1.holds, "a share in [0, 1), less than all steps")
    )
    weight_decay: float = flag("decoupled weight decay", 0.0, allowed=NOT_NEGATIVE)
    neftune_alpha: float = flag(
        "NEFTune: noise on the embeddings in training, +-alpha / sqrt(tokens * width); 0 for none",
        0.0,
        allowed=NOT_NEGATIVE,
        fix="5 to 15 is usual, 0 switches it off",
    )
    optim: Literal["adamw", "adamw8bit"] = flag(
        "AdamW, its moments in fp32 or in 8 bits (2 bytes a trained number instead of 8; embeddings keep fp32)", "adamw"
    )
    beta1: float = flag("AdamW beta1", 0.9, allowed=Allowed(BELOW_1.holds, "a number in [0, 1)"))
    beta2: float = flag("AdamW beta2", 0.999, allowed=Allowed(BELOW_1.holds, "a number in [0, 1)"))
    clip: float = flag("largest gradient norm; 0 switches clipping off", 1.0, allowed=NOT_NEGATIVE)
    dtype: Literal["auto", "bf16", "fp32"] = flag(
        "of the base model and activations; auto: bf16 where the processor has bf16 instructions, else fp32", "auto"
    )
    checkpointing: Literal["none", "selective", "full"] = flag("recompute activations in backward to save memory", "none")
    device: str = flag("cpu, cuda or auto", "auto")
    parallel: Literal["auto", "replicate", "shard"] = flag(
        "on several processes (torchrun): the whole model in each, or a share of it; auto: replicate", "auto"
    )
    seed: int = flag("decides data order, initialisation, dropout and split", 0)
    eval_every: int | None = flag("validate every N steps (default: ten times in the run)", None, "N", allowed=AT_LEAST_1)
    save_every: int | None = flag("checkpoint every N steps (default: at each validation)", None, "N", allowed=AT_LEAST_1)
    keep_last: int = flag("how many newest checkpoints stay (the best always stays)", 2, "N", allowed=AT_LEAST_1)
    patience: int | None = flag("stop after N validations without improvement", None, "N", allowed=AT_LEAST_1)
    eval_metric: str | None = flag(
        f"validate by a metric of minisft eval too, on answers that the model writes: {', '.join(EVAL_METRICS)}", None, "M"
    )
    eval_rows: int | None = flag("with --eval-metric: the first N rows held out (default 100)", None, "N", allowed=AT_LEAST_1)
    eval_new_tokens: int | None = flag(
        "with --eval-metric: longest answer in tokens (default 256, as for eval)", None, "N", allowed=AT_LEAST_1
    )
    best_by: Literal["loss", "metric"] = flag("what decides which checkpoint is the result, and --patience", "loss")
    log_every: int = flag("print a line every N steps when there is no terminal", 10, "N", allowed=AT_LEAST_1)
    report: tuple[str, ...] = flag(f"show the run in trackers too: {', '.join(TRACKERS)}", (), "TRACKER")
    cache: bool = flag("keep the encoded rows of large files in the user's cache folder, for the next run", True)

    def __post_init__(self) -> None:
        if self.init_adapter is None:  # nobody else says them
            for name, value in _ADAPTER_DEFAULTS.items():
                if getattr(self, name) is None and not (name == "targets" and self.method == "full"):
                    object.__setattr__(self, name, value)
        check_fields(self)
        require(self.steps is None or self.epochs is None, "--steps and --epochs", "both", "one of them")
        require(
            self.micro_batch_size is None or self.batch_size % self.micro_batch_size == 0,
            "--micro-batch-size",
            self.micro_batch_size,
            f"a divisor of --batch-size {self.batch_size}",
        )
        require(
            self.decay_share is None or self.schedule == "wsd", "--decay-share", self.decay_share, "--schedule wsd",
            "leave --decay-share away: the other schedules have no part that it could be a share of",
        )  # fmt: skip
        require(
            self.replay_share is None or self.replay is not None, "--replay-share", self.replay_share, "--replay F with it",
            "name the file, or leave --replay-share away",
        )  # fmt: skip
        require(
            self.quant == "none" or self.method == "lora", "--quant with --method full", self.quant, "none",
            "a frozen 4-bit base has nothing to train in full; leave --method away and adapters are trained on it",
        )  # fmt: skip
        require(
            self.init_adapter is None or self.method == "lora", "--init-adapter with --method full", self.method, "lora",
            "leave --init-adapter away, or merge it first and train the merged model",
        )  # fmt: skip
        if self.method == "full":
            self._refuse_adapter_settings()
        self._check_tokens()
        self._check_eval_metric()
        for name in self.report:
            require(name in TRACKERS, "--report", name, " or ".join(TRACKERS), nearest(name, TRACKERS))
        if self.init == "pissa":
            require(
                self.quant == "none", "--quant with --init pissa", self.quant, "none",
                "what is left of each weight would be quantized, and the adapter would fit that base alone: use one of them",
            )  # fmt: skip
            require(
                self.init_adapter is None, "--init with --init-adapter", self.init, "default",
                "leave --init away: the adapter's own numbers are the start",
            )  # fmt: skip
        self.lora  # noqa: B018  (checks rank, alpha, dropout and targets)
        if isinstance(self.data, tuple) and len(self.data) == 1:
            object.__setattr__(self, "data", self.data[0])
        parse_sources(self.data)

    def _check_tokens(self) -> None:
        if self.add_tokens is None:
            require(
                self.train_tokens == "new", "--train-tokens all", "no tokens", "--add-tokens F with it",
                "name the file of tokens, or leave it away; --targets with embed_tokens trains an adapter on all rows",
            )  # fmt: skip
            return
        require(
            self.init_adapter is None, "--add-tokens with --init-adapter", self.add_tokens, "one of them",
            "leave --add-tokens away: an adapter brings its own tokens; or merge it, and add tokens to the merged model",
        )  # fmt: skip
        require(
            self.parallel != "shard", "--add-tokens with --parallel shard", self.parallel, "replicate",
            "--parallel replicate; --quant nf4 makes the base smaller",
        )  # fmt: skip
        is_full = self.method == "full"
        require(
            not is_full or self.targets is None, "--add-tokens with --method full and --targets", self.targets, "no --targets",
            "leave --targets away, or new rows might never be trained; or leave --method away for adapters",
        )  # fmt: skip
        require(
            not is_full or self.train_tokens == "new", "--train-tokens with --method full", self.train_tokens, "nothing",
            "leave --train-tokens away: all weights are trained",
        )  # fmt: skip

    def _check_eval_metric(self) -> None:
        metric = self.eval_metric
        if metric is not None:
            require(metric in EVAL_METRICS, "--eval-metric", metric, " or ".join(EVAL_METRICS), nearest(metric, EVAL_METRICS))
            return
        for name, is_given in {
            "--eval-rows": self.eval_rows is not None,
            "--eval-new-tokens": self.eval_new_tokens is not None,
            "--best-by metric": self.best_by == "metric",
        }.items():
            require(not is_given, name, "no metric", "--eval-metric M with it", f"name the metric, or leave {name} away")

    def _refuse_adapter_settings(self) -> None:
        """Training in full has no adapter: what describes one must be as it is by default, not ignored."""
        for name in _ADAPTER_ONLY:
            value, default = getattr(self, name), getattr(type(self), name)
            require(
                value in (default, _ADAPTER_DEFAULTS.get(name)), f"{flag_name(name)} with --method full", value,
                "nothing" if default is None else f"{default:g}" if isinstance(default, float) else default,
                f"leave {flag_name(name)} away: there is no adapter",
            )  # fmt: skip

    @property
    def lora(self) -> LoRAConfig:
        """The adapter that this run trains; with ``init_adapter``, what is given here, and defaults elsewhere.

        With ``method = "full"`` only its ``targets`` count, and only if ``self.targets`` is not None.
        """
        given = {name: getattr(self, name) for name in _ADAPTER_DEFAULTS}
        rank, alpha, use_rslora, use_dora, targets = (
            default if given[name] is None else given[name] for name, default in _ADAPTER_DEFAULTS.items()
        )
        # One target with regex characters, or the word all-linear, is PEFT's string form; anything else is names.
        is_pattern = len(targets) == 1 and (
            targets[0] == ALL_LINEAR or not targets[0].replace(".", "").replace("_", "").isalnum()
        )
        return LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=self.dropout,
            use_rslora=use_rslora,
            targets=targets[0] if is_pattern else targets,
            use_dora=use_dora,
            init=self.init,
        )

    @property
    def quantization(self) -> QuantConfig | None:
        """How the frozen base is quantized; None when it stays dense."""
        return None if self.quant == "none" else QuantConfig(levels=self.quant, double_quant=self.double_quant)

    @property
    def peak_lr(self) -> float:
        """``lr``, or the field's usual choice for the method."""
        return self.lr if self.lr is not None else (2e-4 if self.method == "lora" else 2e-5)

    @property
    def replay_share_or_default(self) -> float:
        """``replay_share``, or a tenth; 0 without ``replay``."""
        return 0.0 if self.replay is None else 0.1 if self.replay_share is None else self.replay_share

    def to_dict(self) -> dict[str, typing.Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)


def run_config(values: dict[str, object], where: str = "settings") -> RunConfig:
    """``config_of(RunConfig, values, where)``.

    Raises:
        UserError: unknown key (names the nearest), missing key, wrong type or value.
    """
    return config_of(RunConfig, values, where)
