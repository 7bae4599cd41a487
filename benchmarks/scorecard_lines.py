"""The eighteen lines of the scorecard: what is promised, the number that it is held to, and how it is measured.

Most are tests of the suite, run with counted examples; the others are in ``scorecard_crashes``, ``scorecard_memory`` and
``scorecard_fuzz``. ``--quick`` asks for few examples, so the checks that count them (``sizes``) are left out there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import scorecard_crashes
import scorecard_fuzz
import scorecard_memory
from scorecard_parts import ROOT, TESTS, Line, run_tests

NONE = ("failed == 0", "skipped == 0", "tests >= 1")


def few(examples: int, quick: bool) -> int:
    return 5 if quick else examples


def nf4_bits(quick: bool) -> dict[str, object]:
    found = run_tests(["test_nf4.py"], "bits_equal_bitsandbytes" + (" and not ten_million" if quick else ""))
    large = sum("ten_million" in name for name in found.names)
    patterns = sum("every_16_bit" in name for name in found.names)
    return found.numbers(quick) | {"weights (millions)": 10 * large, "16-bit sweeps": patterns}


NF4_LAWS = (
    "pack_and_unpack or pack_unpack or codes_rise or error_is_at_most or quantizing_twice or power_of_two"
    " or blocks_are_independent or negation or zero_block or not_finite"
)


def nf4_laws(quick: bool) -> dict[str, object]:
    return run_tests(["test_nf4.py"], NF4_LAWS, few(2000, quick)).numbers(quick)


def merge_exact(quick: bool) -> dict[str, object]:
    tests = ["equivalence/test_same_function.py::test_in_fp64_all_three_agree_to_1e_12", "equivalence/test_algebra.py"]
    return run_tests(tests, examples=few(2000, quick)).numbers(quick)


ROUNDED = ("in_every_dtype_they_agree", "on_gaussian_data", "rounded_once", "allowance")


def merge_rounded(quick: bool) -> dict[str, object]:
    """Nine bases with 115 examples each are over a thousand for a law; one process, so that it stays within three minutes."""
    rounded = run_tests(["equivalence/test_same_function.py"], " or ".join(ROUNDED), few(115, quick)).numbers(quick)
    report = run_tests(["equivalence/test_effect.py"], examples=few(1000, quick)).numbers(quick)
    return _sum(rounded, report)


def _sum(*parts: dict[str, object]) -> dict[str, object]:
    """The numbers of several runs of tests, added."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = value if name == "quick" else total[name] + value if name in total else value
    return total


def gradients(quick: bool) -> dict[str, object]:
    """Triton's interpreter is chosen when a process starts, so its kernels have their own."""
    dense = run_tests(
        [
            "test_lora.py",
            "test_nf4_linear.py",
            "test_dora.py",
            "test_elementwise.py",
            "test_attention.py",
            "equivalence/test_gradients.py",
        ],
        "gradcheck or dense_autograd or gradients_are or gradients_equal or values_and_gradients or same_gradient",
        few(50, quick),
    )
    cases = run_tests(["kernel_cases.py"], "zero or nibbles" if quick else "", environment={"TRITON_INTERPRET": "1"})
    return _sum(dense.numbers(quick), cases.numbers(quick)) | {"kernel cases": cases.passed}


CROSS = {
    "adapters": ("test_formats_adapter.py", "peft_loads_ours or ours_loads_peft"),
    "models": ("test_formats_hf.py", "logits_equal_transformers"),
    "merged": ("equivalence/test_families.py", "transformers_loads_the_merge"),
    "chats": ("test_chat.py", "have_transformers_ids"),
    "templates": ("test_template.py", "rendering_equals"),
}


def cross_tools(quick: bool) -> dict[str, object]:
    """Another library's logits and ids. Without it the tests are skipped, and the line says so; what failed is a miss."""
    found = {name: run_tests([file], keyword) for name, (file, keyword) in CROSS.items() if not quick or name == "adapters"}
    absent = [name for name, tests in found.items() if tests.skipped]
    if absent and not any(tests.failed for tests in found.values()):
        return {"absent": f"PEFT, transformers or the pretrained model is not installed: {', '.join(absent)} were skipped"}
    total = _sum(*(tests.numbers(quick) for tests in found.values()))
    return total | {"configurations": sum(found[name].passed for name in ("adapters", "models", "merged") if name in found)}


def accumulation(quick: bool) -> dict[str, object]:
    keyword = (
        "any_cut_of_a_step or no_cut_of_a_step or eight_by_one or beginning_computed_once or"
        " any_number_of_processes_computes_the_same_step"
        " or all_processes_train_the_same_bits or packed_and_padded"
    )
    files = (
        ["test_step.py", "test_batching.py"]
        if quick
        else ["test_step.py", "test_batching.py", "test_parallel.py", "test_train.py"]
    )
    return run_tests(files, keyword, few(50, quick)).numbers(quick)


NUMBERED = re.compile(r"::test_(\d\d)_(?:to_(\d\d)_)?")


def bad_inputs_of(names: tuple[str, ...]) -> set[int]:
    """Which numbers of the list of bad inputs these tests carry in their names."""
    found: set[int] = set()
    for name in names:
        if match := NUMBERED.search(name):
            found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found & set(range(1, 57))


def bad_inputs(quick: bool) -> dict[str, object]:
    files = sorted({path.name for path in TESTS.glob("test_*.py") if re.search(r"^def test_\d\d_", path.read_text(), re.M)})
    found = run_tests(files, " or ".join(f"test_{tens}" for tens in range(1 if quick else 6)))
    covered = bad_inputs_of(found.names)
    missing = ", ".join(map(str, sorted(set(range(1, 57)) - covered))) or "none"
    return found.numbers(quick) | {"inputs": len(covered), "without a test": missing}


def security(quick: bool) -> dict[str, object]:
    canaries = run_tests(["test_canaries.py"], examples=few(500, quick)).numbers(quick)
    code = run_tests(["test_architecture.py"], "text_becomes_code or third_party or reader_of_calls").numbers(quick)
    return _sum(canaries, code)


# One for each way of being wrong that the lines above are there to notice; ``make mutants`` plants all that there are.
MUTANTS = (
    "nf4-nibbles-swapped", "nf4-division-instead-of-reciprocal", "nf4-tie-goes-up", "nf4-signed-largest",
    "nf4-last-odd-code-lost",
    "nf4-offset-never-added", "nf4-rounded-twice", "nf4-zero-block-is-minus-zero", "nf4-infinity-unnoticed",
    "merge-loses-negative-zeros", "merge-delta-in-16-bits", "merge-report-counts-all-entries", "merge-rounds-delta-first",
    "merge-subtracts",
    "merge-scaling-dropped", "merge-in-place-without-bias", "merge-wrong-base", "requantize-always-double",
    "merge-checks-nothing",
    "merge-layer-by-layer", "merge-last-layer-forgotten", "unmerge-by-subtraction", "lora-alpha-without-rank",
    "lora-scaled-twice",
    "lora-bias-twice", "dora-bias-scaled", "loss-is-a-mean", "step-mean-of-means", "batch-not-shifted",
    "batch-flags-not-shifted",
    "attention-sees-the-next-token", "cache-position-off-by-one", "adapter-factors-swapped", "adapter-alpha-not-saved",
    "optim-decay-coupled", "optim-step-count-lost", "resume-skips-a-step", "file-renamed-before-it-is-synced",
    "chat-data-writes-control-tokens", "chat-border-token-not-learned",
)  # fmt: skip


def seeded_bugs(quick: bool) -> dict[str, object]:
    names = MUTANTS[4:6] if quick else MUTANTS
    done = subprocess.run(
        [sys.executable, str(TESTS / "mutants.py"), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    last = re.search(r"(\d+) of (\d+) mutants killed", done.stdout)
    if last is None:
        return {"error": done.stdout[-1500:] + done.stderr[-500:]}
    return {"planted": int(last[2]), "killed": int(last[1]), "alive": int(last[2]) - int(last[1]), "quick": quick}


FAULTS = "killed_process_is_named or signal_to_one_process or knows_no_number or full_disk_on_the_first or other_data_on_one"


def two_processes(quick: bool) -> dict[str, object]:
    faults = run_tests(["test_parallel_faults.py"], "killed_process_is_named" if quick else FAULTS)
    skipped = run_tests(["test_parallel.py"], "not_finite_on_one_process")
    return _sum(faults.numbers(quick), skipped.numbers(quick)) | {"seconds to end": faults.most("seconds to end")}


LINES = (
    Line(
        1, "NF4 against bitsandbytes: Gaussian weights in three dtypes and every block size, ragged ends, every 16-bit number",
        "0 differing bytes", NONE, "{weights (millions)} million weights and {16-bit sweeps} sweeps: 0 differ", nf4_bits, 150,
        "mean error within 7 sigma; comparison with torchao skipped (read)",
        ("weights (millions) >= 210", "16-bit sweeps >= 8"),
    ),
    Line(
        2, "laws of NF4: packing, order, error, idempotence, scaling, independent blocks, zeros, what is not finite",
        "0 violations in 2,000 examples a law", NONE, "{examples} examples, {failed} violations", nf4_laws, 60,
        "none (read)",
        ("examples >= 10000",),
    ),
    Line(
        3, "merging in fp64: W' = W + s B A for every layer kind; zeros, permutations, alpha, order of adapters",
        "error at most 1e-12 of the terms; a zero update changes no bit; 2,000 examples", NONE,
        "{examples} examples, {failed} violations", merge_exact, 90, "1e-4 in fp32; PEFT's tests in 4 bits: rtol 10 (read)",
        ("examples >= 2000",),
    ),
    Line(
        4, "merging in fp32, bf16, fp16 and 4 bits against derived bounds; the report against brute force",
        "0 beyond the worst case, or 4 times the expected on Gaussian data; 1,000 examples a law", NONE,
        "{examples} examples, {failed} violations", merge_rounded, 120, "none (read)", ("examples >= 3000",),
    ),
    Line(
        5, "merge and unmerge, 1,000 times for each of nine bases; a merge that fails in its last module",
        "not one bit changes",
        ("changed == 0", "half merged == 0", "bases >= 9"),
        "{bases} bases, {cycles} cycles each: {changed} changed, {half merged} half merged",
        scorecard_memory.unmerge, 90,
        "PEFT, bf16, 50 cycles, measured in the same run: {peft drift %} % of the weights are others",
        ("cycles >= 1000",),
    ),
    Line(
        6, "gradients against dense autograd and gradcheck; every Triton kernel under the interpreter against its twin",
        "1e-12 in fp64; kernels bit-equal or within the bound of the product", NONE,
        "{tests} tests, {kernel cases} of them kernels, {examples} examples: {failed} fail", gradients, 150,
        "no gradcheck in 15 repositories (read)", ("kernel cases >= 100",),
    ),
    Line(
        7, "logits of adapters and merged models in PEFT and transformers, both ways; ids of 1,000 chats",
        "equal within the tests' bound for at least 20 configurations; all ids the same", NONE,
        "{configurations} configurations, {tests} tests: {failed} fail", cross_tools, 100, "partial (read)",
        ("configurations >= 20",),
    ),
    Line(
        8, "any cut of a step, packed or padded, one to three processes: the same gradient and, after 20 steps, parameters",
        "1e-12 in fp64", NONE, "{tests} tests, {examples} examples: {failed} fail", accumulation, 60,
        "TRL: 1e-3 on a GPU (read)",
        ("tests >= 20",),
    ),
    Line(
        9, "kill -9 inside each optimizer step of a 40-step run with dropout, resume, compare weights, optimizer, log",
        "40 of 40 the same bits", ("missed == 0", "kills >= 4"), "{identical} of {kills}", scorecard_crashes.resume, 90,
        "torchtune: loss 1e-5 at an epoch's end; none at every step (read)", ("kills >= 40",),
    ),
    Line(
        10, "kill -9 at 1,000 random instants of saving back to back; the same against a writer without staging",
        "0 acknowledged checkpoints lost, 0 invalid; the control fails at least 30 %", ("lost == 0", "invalid == 0",
        "acknowledged >= 1", "control % >= 30"),
        "{kills} kills, {acknowledged} checkpoints: {lost} lost, {invalid} invalid; control fails {control %} %",
        scorecard_crashes.kills,
        175, "none in LLM trainers (read); writing in place, as HF Trainer does: 62 of 100 unusable (noted)",
        ("kills >= 1000", "acknowledged >= 1000"),
    ),
    Line(
        11, "every state that a crash or power cut may leave of a save; ENOSPC and EIO at every call of a save and of a"
        " run; flips; cuts",
        "all load old or new bit for bit; every flip noticed; 0 tracebacks", (*NONE, "tracebacks == 0", "lost == 0",
        "failing runs >= 1"),
        "{states} states, {failed calls} failed calls, {failing runs} failing runs, {flips} flips, {truncations} cuts:"
        " {failed} wrong,"
        " {tracebacks} tracebacks", scorecard_crashes.crash_states, 120, "none (read)",
        ("states >= 100", "flips >= 1000", "truncations >= 1000", "failing runs >= 80"),
    ),
    Line(
        12, "memory of a merge from files to files: a bf16 base of 2 x 512 MiB against one of 256 MiB,"
        " its adapter of rank 2 included: that is held whole and grows with rank and layers, so a small one shows the merge",
        "at most 64 MiB, and 8 MiB between the two; every number that of the merge in memory",
        ("grown MiB <= 64", "difference MiB <= 8", "differing == 0", "tensors >= 1", "large shards >= 2"),
        "{large MiB} and {small MiB} MiB; {differing} of {tensors} tensors differ", scorecard_memory.merge_memory, 100,
        "the whole model or a whole shard (read)",
    ),
    Line(
        13, "3,000 steps beyond 200 of warm-up, with saves and evaluations",
        "at most 1 MiB more memory, no more files or threads",
        ("grown KiB <= 1024", "files == 0", "threads == 0", "steps >= 50"),
        "{steps} steps, {saves} saves: {grown KiB} KiB, {files} files, {threads} threads", scorecard_memory.soak, 90,
        "none (read)",
        ("steps >= 3000",),
    ),
    Line(
        14, "20,000 hostile files (safetensors, GGUF, JSON, JSONL, tokenizer, template), mutated by their structure, 64 MiB"
        " of memory each",
        "read or refused with a code; at most 2 s each (a template's own trial is stopped after 2 s)",
        ("faults == 0", "formats == 6", "longest s <= 2", "longest stopped s <= 2.5"),
        "{files} files: {read} read, {refused} refused, {faults} faults; longest {longest s:.2f} s, {stopped} stopped at 2 s",
        scorecard_fuzz.hostile_files, 170,
        "gguf's own reader on 13 hostile files: 1 hang, 7 internal exceptions, 1 accepted, 4 clear errors (noted)",
        ("files >= 20000",),
    ),
    Line(
        15, "the 56 bad inputs through the command line",
        "56 of 56: code, place and fix in one line, nothing written outside --out",
        NONE, "{inputs} of 56 in {tests} tests, {failed} fail; without a test: {without a test}", bad_inputs, 90,
        "ad hoc (read)",
        ("inputs == 56",),
    ),
    Line(
        16, "30 template injections, names of files, markup and control characters, calls that run text, the network",
        "0 escapes, 0 elements, 0 network calls; most injections do work without the sandbox", (*NONE, "network calls == 0"),
        "{injections} injections ({control escapes} work without the sandbox), {examples} examples, {commands} commands with"
        " {network calls} network calls: {failed} fail", security, 60,
        "2 of 8 peers render templates without a sandbox (read)",
        ("injections >= 30", "control escapes >= 20"),
    ),
    Line(
        17, "40 known bugs, planted one at a time", "each noticed by the test that is named for it",
        ("alive == 0", "killed >= 2"),
        "{killed} of {planted}", seeded_bugs, 160, "none (read)", ("planted >= 40",),
    ),
    Line(
        18, "two processes: kill -9 or SIGTERM of one, NaN on one, other data on one, a full disk; resumed by another number",
        "the survivor ends within 30 s and names the rank; the step is skipped by all; the same bits on resume",
        (*NONE, "seconds to end <= 30"),
        "{tests} tests, {failed} fail; the survivor ended after {seconds to end:.1f} s at most",
        two_processes, 90, "known hangs (read)", ("tests >= 16",),
    ),
)  # fmt: skip
