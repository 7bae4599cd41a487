"""What ``select`` is asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from minisft.common.errors import UserError, visible

MODEL_SCORES = ("ifd", "pmi", "loss")
SCORES = (*MODEL_SCORES, "length", "random")


@dataclass(frozen=True)
class Settings:
    """What ``select`` was asked for; names and meanings are those of its flags."""

    score: str = "random"
    ifd: str = "ratio"
    rows: int | None = None
    tokens: int | None = None
    drop_defects: bool = False
    dedup: str | None = None
    near: float = 0.8
    diverse: str = "none"
    keep_rate: float | None = None
    bins: int = 1
    embedding: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.score not in SCORES and not (self.score.startswith("column:") and len(self.score) > len("column:")):
            raise _out_of_range("score", self.score, " or ".join([*SCORES, "column:NAME"]))
        for name, least in (("rows", 1), ("tokens", 1), ("bins", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise _out_of_range({"bins": "within-length-bins"}.get(name, name), value, f"at least {least}")
        if not 0 < self.near <= 1:
            raise _out_of_range("near", self.near, "above 0, at most 1")
        if self.keep_rate is not None and not 0 < self.keep_rate <= 1:
            raise _out_of_range("keep-rate", self.keep_rate, "above 0, at most 1")
        if self.keep_rate is not None and self.diverse != "greedy":
            raise _needs("--keep-rate", "--diverse greedy")
        if self.embedding is not None and self.diverse == "none":
            raise _needs("--embedding", "--diverse greedy, kcenter or facility")
        if self.diverse in ("kcenter", "facility") and self.rows is None and self.tokens is None:
            raise _needs(f"--diverse {self.diverse}", "a budget: --rows N or --tokens T")

    @property
    def needs_alone(self) -> bool:
        """Whether the score compares with the answer without its prompt."""
        return self.score in ("ifd", "pmi")

    @property
    def needs_states(self) -> bool:
        """Whether diversity is judged by a model's hidden states, when a model is named."""
        return self.diverse != "none" and self.embedding is None

    @property
    def needs_model(self) -> bool:
        """Whether the score is a model's."""
        return self.score in MODEL_SCORES


def _out_of_range(flag: str, found: object, expected: str) -> UserError:
    fix = f"--{flag} with a value in range"
    return UserError(
        "config/bad-value", "a setting is out of range", where=f"--{flag}", found=visible(found), expected=expected, fix=fix
    )


def _needs(flag: str, other: str) -> UserError:
    return UserError("config/usage", "this flag needs another one", where="minisft select", found=flag, fix=f"add {other}")
