"""A/B tests from files: the plan, the split, effects against the statistics, guardrails, looks that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minisft.cli.main import main
from minisft.common import safe_json
from minisft.common.errors import UserError
from minisft.evaluation.statistics import holm, newcombe_interval
from minisft.judging.ab_file import read_trial
from minisft.judging.ab_plan import parse_effect, plan_ab, read_plan, write_plan
from minisft.judging.ab_statistics import rates_p, sequential, welch
from minisft.judging.ab_test import analyze_ab, parse_guardrail


def write_units(path: Path, p_a=0.1, p_b=0.1, n=400, seed=0, shift=0.0, extra=()):
    rng = np.random.default_rng(seed)
    lines = [",".join(["unit", "variant", "converted", "value", "time", "segment", "latency", *extra])]
    for i in range(2 * n):
        arm = i % 2
        converted = int(rng.random() < (p_a, p_b)[arm])
        value, latency = rng.normal(10 + shift * arm, 3), rng.normal(1.0 + 0.01 * arm, 0.1)
        lines.append(f"u{i},{'ab'[arm]},{converted},{value:.6f},{i},{('new', 'old')[i // 2 % 2]},{latency:.6f}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def units(tmp_path):
    return write_units(tmp_path / "units.csv", 0.1, 0.2, shift=1.0)


# --- the plan


def test_a_plan_counts_units_and_days_and_survives_its_file(tmp_path):
    plan = plan_ab(0.1, 0.02, "fixed", traffic=500)
    assert (plan.units_per_arm, plan.days, plan.tau) == (3841, 16, 0.02)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(("text", "effect"), [("0.02", 0.02), ("-0.02", -0.02), ("20%rel", 0.02), ("0.2rel", 0.02)])
def test_an_effect_is_absolute_or_relative(text, effect):
    assert parse_effect(text, 0.1) == pytest.approx(effect)


@pytest.mark.parametrize("text", ["10%", "", "rel", "nan", "much"])
def test_an_effect_that_may_mean_two_things_is_refused(text):
    with pytest.raises(UserError, match="effect"):
        parse_effect(text, 0.1)


# --- the analysis


@pytest.mark.slow
def test_effects_are_those_of_the_statistics(units):
    report = analyze_ab(
        units, design="fixed", looks=1, guardrails=[parse_guardrail("latency<=0.05"), parse_guardrail("value>=-1")]
    )
    trial = read_trial(units, ["latency"])
    a, b = trial.of("a"), trial.of("b")
    k_a, k_b = sum(u.converted for u in a), sum(u.converted for u in b)
    effect = report["effects"]["b"]
    assert effect["units"] == [400, 400]
    assert effect["rates"] == [k_a / 400, k_b / 400]
    assert effect["p_value"] == rates_p(k_a, 400, k_b, 400)[0] < 0.001
    assert effect["difference"] == newcombe_interval(k_a, 400, k_b, 400).to_json()
    values = [np.array([u.numbers["value"] for u in arm]) for arm in (a, b)]
    assert effect["value"]["p_value"] == pytest.approx(welch(*values).p_value)
    latencies = [np.array([u.numbers["latency"] for u in arm]) for arm in (a, b)]
    first, second = report["guardrails"]
    one_sided = [welch(latencies[1], latencies[0]).p_above(-0.05), welch(*values).p_above(-1.0)]
    assert [first["p_value"], second["p_value"]] == pytest.approx(one_sided)
    assert [first["p_holm"], second["p_holm"]] == pytest.approx(holm(one_sided))
    assert first["kept"]
    assert second["kept"]
    assert {s["segment"] for s in report["segments_exploratory"]} == {"new", "old"}
    assert report["headline"]["estimate"] == effect["difference"]["estimate"]


@pytest.mark.slow
def test_a_guardrail_that_is_broken_is_not_kept(units):
    report = analyze_ab(
        units, design="fixed", looks=1, guardrails=[parse_guardrail("latency<=0.001"), parse_guardrail("value>=2")]
    )
    assert [g["kept"] for g in report["guardrails"]] == [False, False]


@pytest.mark.slow
def test_a_covariate_takes_variance_away(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["unit,variant,converted,value,before"]
    for i in range(1000):
        before = rng.normal()
        lines.append(f"{i},{'ab'[i % 2]},0,{2 * before + rng.normal():.6f},{before:.6f}")
    (tmp_path / "d.csv").write_text("\n".join(lines))
    plain = analyze_ab(tmp_path / "d.csv", design="fixed", looks=1)["effects"]["b"]["value"]
    adjusted = analyze_ab(tmp_path / "d.csv", design="fixed", looks=1, covariate="before")["effects"]["b"]["value"]
    assert adjusted["variance_left_by_covariate"] == pytest.approx(0.2, abs=0.04)
    assert adjusted["welch"]["high"] - adjusted["welch"]["low"] < 0.55 * (plain["welch"]["high"] - plain["welch"]["low"])


def test_three_variants_are_each_held_against_the_control_with_holm(tmp_path):
    rng = np.random.default_rng(1)
    lines = ["unit,variant,converted"] + [f"{i},{'abc'[i % 3]},{int(rng.random() < 0.2)}" for i in range(900)]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    effects = analyze_ab(tmp_path / "d.csv", design="fixed", looks=1, control="b")["effects"]
    assert list(effects) == ["a", "c"]
    assert [e["p_holm"] for e in effects.values()] == pytest.approx(holm([e["p_value"] for e in effects.values()]))


def test_rows_of_one_unit_are_one_observation(tmp_path):
    rows = [{"unit": f"u{i}", "variant": "ab"[i % 2], "converted": i % 4 == 0, "value": 1.5} for i in range(100)]
    (tmp_path / "once.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * 2))
    once, twice = read_trial(tmp_path / "once.jsonl"), read_trial(tmp_path / "twice.jsonl")
    assert len(once.units) == len(twice.units) == 100
    assert [u.converted for u in once.units] == [u.converted for u in twice.units]
    assert [2 * u.numbers["value"] for u in once.units] == [u.numbers["value"] for u in twice.units]
    assert "100 of 200 rows" in twice.notes[0]


def test_a_broken_split_ends_the_analysis(tmp_path):
    lines = ["unit,variant,converted"] + [f"{i},{'a' if i % 10 < 6 else 'b'},0" for i in range(1000)]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="data/sample-ratio-mismatch"):
        analyze_ab(tmp_path / "d.csv", design="fixed", looks=1)
    assert analyze_ab(tmp_path / "d.csv", design="fixed", looks=1, shares=[0.6, 0.4])["split"]["p_value"] == 1.0


# --- looks


def test_the_sequential_test_is_the_one_of_the_statistics(units):
    effect = analyze_ab(units, design="sequential", tau=0.05)["effects"]["b"]
    trial = read_trial(units)
    arms = [np.array([float(u.converted) for u in trial.of(name)]) for name in "ab"]
    at_once = sequential([arms[0]], [arms[1]], 0.05)[-1]
    assert effect["difference"] == at_once.interval.to_json()
    assert effect["p_value"] <= at_once.p_value
    assert effect["looks"] == 100
    assert 0 < effect["shown_after_units"] <= 800


def test_where_nobody_has_converted_the_file_is_still_json(tmp_path):
    data = write_units(tmp_path / "none.csv", 0.0, 0.0, n=50)
    words = [
        "ab",
        "analyze",
        "--data",
        str(data),
        "--design",
        "sequential",
        "--tau",
        "0.05",
        "--out",
        str(tmp_path / "ab.json"),
    ]
    assert main(words) == 0
    headline = safe_json.loads((tmp_path / "ab.json").read_bytes())["headline"]  # refuses Infinity
    assert (headline["estimate"], headline["low"], headline["high"]) == (0.0, -1.0, 1.0)


def test_a_fixed_horizon_has_one_look(units, tmp_path):
    with pytest.raises(UserError, match="config/no-looks"):
        analyze_ab(units, design="fixed")
    with pytest.raises(UserError, match="config/peeked"):
        analyze_ab(units, design="fixed", looks=2)
    with pytest.raises(UserError, match="config/no-design"):
        analyze_ab(units)
    with pytest.raises(UserError, match="config/no-tau"):
        analyze_ab(units, design="sequential")


@pytest.mark.slow
def test_a_plan_refuses_to_be_analysed_early_or_again_with_more_data(tmp_path):
    plan = tmp_path / "plan.json"
    write_plan(plan_ab(0.1, 0.1, "fixed"), plan)
    n = read_plan(plan).units_per_arm
    small, full, more = (write_units(tmp_path / f"{k}.csv", 0.1, 0.2, n=k) for k in (n - 1, n, n + 50))
    with pytest.raises(UserError, match="config/too-early"):
        analyze_ab(small, plan=plan)
    first = analyze_ab(full, plan=plan)
    assert analyze_ab(full, plan=plan) == first  # the same data again is the same look
    assert len(read_plan(plan).analyses) == 1
    with pytest.raises(UserError, match="config/peeked"):
        analyze_ab(more, plan=plan)
    with pytest.raises(UserError, match="config/other-design"):
        analyze_ab(more, plan=plan, design="sequential", tau=0.1)


def test_a_sequential_plan_may_be_looked_at_as_often_as_one_likes(tmp_path):
    plan = tmp_path / "plan.json"
    write_plan(plan_ab(0.1, 0.1, "sequential"), plan)
    for n in (50, 100, 200):
        report = analyze_ab(write_units(tmp_path / f"{n}.csv", 0.1, 0.2, n=n), plan=plan)
    assert report["design"] == "sequential"
    assert [entry["units"] for entry in read_plan(plan).analyses] == [100, 200, 400]


def test_guardrails_hold_at_every_look_of_a_sequential_design(units):
    rails = [parse_guardrail("latency<=0.2"), parse_guardrail("latency<=0.001")]
    report = analyze_ab(units, design="sequential", tau=0.05, guardrails=rails)
    assert [g["kept"] for g in report["guardrails"]] == [True, False]
    without = analyze_ab(units, design="sequential", tau=0.05)
    assert "value is not judged" in without["notes"][0]


# --- the command


@pytest.mark.slow
def test_the_command_plans_and_analyses(units, tmp_path, capsys):
    words = ["ab", "plan", "--baseline", "0.1", "--effect", "0.1", "--traffic", "100", "--out", str(tmp_path / "plan.json")]
    assert main(words) == 0
    assert "units an arm" in capsys.readouterr().out
    words = ["ab", "analyze", "--data", str(units), "--plan", str(tmp_path / "plan.json"), "--guardrail", "latency<=0.05"]
    assert main([*words, "--out", str(tmp_path / "ab.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("split: ")
    for part in ("b - a: conversion", "guardrail latency", "exploratory", "Welch"):
        assert part in printed
    report = json.loads((tmp_path / "ab.json").read_text())
    assert set(report["headline"]) >= {"name", "estimate", "low", "high"}
