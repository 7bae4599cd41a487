"""TRL's own losses on the same log-probabilities: DPO and GRPO, with ragged answers, in fp64."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from tiny import assert_close, randn
from torch import Tensor

from minisft.preference import advantages, dpo_loss, grpo_loss

pytest.importorskip("trl", reason="needs TRL: pip install trl")
pytestmark = pytest.mark.slow  # importing it takes seconds

LENGTHS = torch.tensor([4, 2, 6, 1])
LONGEST = 6
MASK = (torch.arange(LONGEST) < LENGTHS[:, None]).long()


def per_token(seed: int) -> Tensor:
    """(4, 6) log-probabilities, 0 where there is no token."""
    return -randn(4, LONGEST, seed=seed).abs() * MASK


def accelerator() -> MagicMock:
    made = MagicMock()
    made.gather_for_metrics = made.gather = lambda value: value
    made.device, made.num_processes = torch.device("cpu"), 1
    return made


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_types": ["sigmoid"]}, {}),
        ({"loss_types": ["hinge"]}, {"loss": "hinge"}),
        ({"loss_types": ["ipo"]}, {"loss": "ipo"}),
        ({"loss_types": ["robust"], "label_smoothing": 0.2}, {"loss": "robust", "label_smoothing": 0.2}),
    ],
)
def test_dpo(theirs: dict[str, object], ours: dict[str, object]) -> None:
    from trl import DPOTrainer

    log_probs = per_token(1).requires_grad_()
    reference = per_token(2).sum(1)
    stub = MagicMock()
    stub.configure_mock(
        accelerator=accelerator(), aux_loss_enabled=False, ld_alpha=None, f_divergence_type="reverse_kl", beta=0.3,
        loss_weights=[1.0], precompute_ref_logps=True, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        **{"label_smoothing": 0.0, **theirs},
    )  # fmt: skip
    zeros = torch.zeros(4, LONGEST, dtype=torch.float64)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    completion = torch.cat([torch.zeros(4, 1, dtype=torch.int64), MASK], 1)  # one token of prompt before each answer
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion), "completion_mask": completion,
        "ref_chosen_logps": reference[:2], "ref_rejected_logps": reference[2:],
    }  # fmt: skip
    wanted = DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, False)
    sums = log_probs.sum(1)
    found = dpo_loss(
        *sums.split(2), *reference.split(2), chosen_lengths=LENGTHS[:2], rejected_lengths=LENGTHS[2:], beta=0.3, **ours
    ).mean()
    assert_close(found, wanted)
    (a,), (b,) = (torch.autograd.grad(value, [log_probs], retain_graph=True) for value in (found, wanted))
    assert_close(a * MASK, b * MASK)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo(loss: str, beta: float) -> None:
    from trl import GRPOTrainer

    log_probs, old, reference = per_token(1).requires_grad_(), per_token(2), per_token(3)
    A = advantages(torch.tensor([1.0, 0.0, 0.5, 0.0]), "zscore")
    stub = MagicMock()
    stub.configure_mock(
        accelerator=accelerator(), aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, loss_type=loss, epsilon_low=0.2, epsilon_high=0.28, use_vllm=False,
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
    )  # fmt: skip
    stub.args.configure_mock(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    prompt = torch.ones(4, 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": torch.ones_like(MASK), "completion_mask": MASK,
        "advantages": A, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": LENGTHS.sum(),
    }  # fmt: skip
    wanted = GRPOTrainer._compute_loss(stub, None, inputs)
    real = MASK.bool()
    found = grpo_loss(
        log_probs[real], old[real], A, LENGTHS, loss=loss, max_new_tokens=LONGEST, epsilon=0.2, epsilon_high=0.28, beta=beta,
        reference_log_probs=reference[real],
    )  # fmt: skip
    assert_close(found, wanted)
    (a,), (b,) = (torch.autograd.grad(value, [log_probs], retain_graph=True) for value in (found, wanted))
    assert_close(a, b)
