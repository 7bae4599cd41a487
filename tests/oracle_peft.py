"""The laws of ``tests/equivalence`` asked of installed PEFT: ``make oracle-peft`` prints which it keeps.

The tests are those of minisft, unchanged; only the layer that they ask about is PEFT's, holding the same numbers
(``equivalence/in_peft.py``). Merging is PEFT's with ``safe_merge=True``. A law that is broken is not always a mistake: PEFT
promises less, for instance over 4 bits, where it quantizes W + D again and warns of rounding.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch

EQUIVALENCE = Path(__file__).parent / "equivalence"
sys.path[:0] = [str(EQUIVALENCE), str(EQUIVALENCE.parent)]  # as pytest finds the suite's modules
import in_peft  # noqa: E402
import laws  # noqa: E402

# The tests that speak of a layer, its adapter and merging in place, and of nothing that PEFT does not have.
LAWS = {
    "test_in_fp64_all_three_agree_to_1e_12": "fp64: unmerged, merged and the formula agree to 1e-12",
    "test_in_every_dtype_they_agree_within_the_worst_case": "they agree within the worst case of rounding",
    "test_on_gaussian_data_they_agree_within_four_times_the_expected": "on Gaussian data within 4 times the expected rounding",
    "test_a_merged_weight_is_the_exact_sum_rounded_once": "a merged weight is the exact sum, rounded once",
    "test_the_layout_in_memory_changes_nothing": "a view gives what its contiguous copy gives",
    "test_unmerging_restores_every_bit_of_a_layer": "three times merged and unmerged: every bit as before",
    "test_a_zero_update_is_the_identity_bit_for_bit": "a zero update changes no bit",
    "test_rows_that_get_no_update_keep_their_bits": "a row without an update keeps its bits",
    "test_powers_of_two_in_alpha_are_exact_in_delta": "twice the alpha is exactly twice the update",
    "test_delta_is_linear_in_alpha": "the update is linear in alpha",
    "test_permuting_the_layer_itself_permutes_its_merge": "permuting outputs commutes with merging",
    "test_the_basis_between_the_factors_does_not_matter": "the basis between A and B does not matter",
    "test_gradients_are_those_of_the_formula": "gradients are those of the formula",
    "test_the_merged_layer_sends_back_the_same_gradient": "the merged layer sends back the same gradient",
}

# And what ``test_beside_peft.py`` shows one by one: each passes as long as PEFT is as it says, and is skipped once it is not.
BESIDE = {
    "test_one_rounding": "bf16: W + D is rounded once",
    "test_unmerging_restores_every_bit": "bf16: ten times merged and unmerged, every bit as before",
    "test_a_failed_merge_changes_nothing": "a merge that fails at one layer changes none",
    "test_unmerging_restores_the_codes": "4 bits: unmerging restores the codes",
    "test_merging_moves_the_bias_as_the_layer_adds_it": "4 bits: a trained bias (lora_bias) is merged as the layer adds it",
    "test_an_adapter_combined_alone_is_itself": "one adapter combined alone with weight 1 is itself (rsLoRA, DoRA)",
}
MOST = 8  # forms listed for each law


class Oracle:
    """A pytest plugin: asks these tests, if wanted with PEFT's layer in the place of ours, and keeps what comes of each."""

    def __init__(self, asked: dict[str, str], of_peft: bool) -> None:
        self.asked, self.of_peft = asked, of_peft
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.found: dict[str, list[str]] = defaultdict(list)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if isinstance(item, pytest.Function) and item.originalname in self.asked]
        if not self.of_peft:
            return
        laws.Case.model = in_peft.model
        for module in {laws, *(item.module for item in items)}:
            for name in ("weight_of", "merge_", "unmerge_", "state"):
                if hasattr(module, name):
                    setattr(module, name, getattr(in_peft, name))

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.when != "call" and call.excinfo is None:
            return
        law, _, form = item.name.rstrip("]").partition("[")
        error = None if call.excinfo is None else call.excinfo.value
        kinds = {type(None): "passed", AssertionError: "failed", pytest.skip.Exception: "skipped"}
        verdict = next((word for kind, word in kinds.items() if isinstance(error, kind)), "error")
        self.outcomes[law][verdict] += 1
        if error is not None:
            text = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            self.found[law].append(f"{verdict}: {form + ': ' if form else ''}{text[:110]}")


def main(only: list[str]) -> None:
    """Ask all the laws, or ``only`` those tests."""
    laws_asked, beside_asked = ({t: law for t, law in asked.items() if not only or t in only} for asked in (LAWS, BESIDE))
    os.environ["MINISFT_HYPOTHESIS"] = "oracle"
    del laws.BASES["nf4-of-fp64"]  # bitsandbytes quantizes no fp64
    laws.LAYERS[:] = [(kind, base) for kind, base in laws.LAYERS if base in laws.BASES]
    laws.IN_FP64.remove("nf4-of-fp64")
    laws.IN_4_BITS.remove("nf4-of-fp64")
    options = ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "-W", "ignore"]
    beside, oracle = Oracle(beside_asked, of_peft=False), Oracle(laws_asked, of_peft=True)
    for plugin in (beside, oracle):
        status = pytest.main([str(EQUIVALENCE), *options], plugins=[plugin])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            sys.exit(f"pytest did not run: {status!r}")
    versions = f"PEFT {peft.__version__}, bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}"
    print(f"minisft's laws of one layer, asked of {versions}\n")
    for test, law in laws_asked.items():
        count, found = oracle.outcomes[test], oracle.found[test]
        verdict = "BROKEN" if count["failed"] else "error" if count["error"] else "kept"
        tally = ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items()))
        print(f"{verdict:7} {law}" + (f" ({tally})" if count.total() > 1 else ""))
        for line in found[:MOST]:
            print(" " * 10 + line)
        if len(found) > MOST:
            print(" " * 10 + f"and {len(found) - MOST} more")
    print("\nOne by one, beside minisft's answer:\n")
    for test, law in beside_asked.items():
        count = beside.outcomes[test]
        unclear = count["failed"] or count["error"]
        print(f"{'unclear' if unclear else 'BROKEN' if count['passed'] else 'kept':7} {law}")
        for line in beside.found[test] if unclear else ():
            print(" " * 10 + line)


if __name__ == "__main__":
    main(sys.argv[1:])
