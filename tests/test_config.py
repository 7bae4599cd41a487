"""Settings are checked at birth: every message by name, and a trip through JSON or TOML changes nothing."""

import dataclasses
import json
import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA

from minisft.common.errors import UserError
from minisft.common.settings import field_type, flag_name, read_toml
from minisft.config import (
    ALL_LINEAR,
    QUANT_BLOCK_SIZES,
    LoRAConfig,
    ModelConfig,
    QuantConfig,
    RunConfig,
    run_config,
)
from minisft.nf4 import BLOCK_SIZES, codebook
from minisft.training.preference_config import DPOConfig

REQUIRED = {"model": "m", "data": "d.jsonl", "out": "o"}
FIELDS = {f.name: f for f in dataclasses.fields(RunConfig)}
NAN, INF = math.nan, math.inf


def message(error: pytest.ExceptionInfo[UserError], code: str) -> str:
    assert error.value.code == code
    assert "\n" not in str(error.value)
    return str(error.value)


# ModelConfig

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"]
SIZES += ["max_position_embeddings"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *(({name: 0}, f"{name} is absurd: config.json; found 0; expected 1 to ") for name in SIZES),
        ({"vocab_size": 2**24 + 1}, "vocab_size is absurd: config.json; found 16777217; expected 1 to 16777216"),
        ({"hidden_size": -8}, "hidden_size is absurd: config.json; found -8"),
        ({"num_layers": 10**9}, "num_layers is absurd"),
        ({"num_kv_heads": 4}, "the heads do not divide: config.json; found 6 heads over 4 kv heads; expected a multiple"),
        ({"head_dim": 7}, "head_dim is odd: config.json; found 7; expected an even number"),
        ({"rms_norm_eps": NAN}, "rms_norm_eps is absurd: config.json; found nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is absurd: config.json; found -1e-06"),
        ({"rope_theta": 0.0}, "rope_theta is absurd: config.json; found 0.0; expected a positive number"),
        ({"rope_theta": INF}, "rope_theta is absurd: config.json; found inf"),
        ({"sliding_window": 0}, "sliding_window is absurd: config.json; found 0; expected a positive number or null"),
        ({"logits_softcap": -30.0}, "logits_softcap is absurd: config.json; found -30.0; expected a positive number or null"),
        ({"residual_multiplier": NAN}, "residual_multiplier is absurd: config.json; found nan; expected a positive number"),
        ({"nope_layers": (0, 2)}, "nope_layers names a layer that is not there: config.json; found [2]; expected 0 to 1"),
        ({"global_layers": (-1,)}, "global_layers names a layer that is not there: config.json; found [-1]"),
    ],
)
def test_model_config_refuses(change, expected):
    with pytest.raises(UserError) as error:
        dataclasses.replace(LLAMA, **change)
    assert f"error[model/bad-config] {expected}" in message(error, "model/bad-config")
    assert error.value.exit_code == 4


def test_model_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LLAMA.num_layers = 3
    assert dataclasses.replace(LLAMA) == LLAMA
    assert ModelConfig(**dataclasses.asdict(LLAMA)) == LLAMA


# LoRAConfig


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rank": 0}, "rank; found 0; expected a rank of at least 1"),
        ({"rank": -3}, "rank; found -3"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj; found 0; expected a rank of at least 1"),
        ({"alpha": NAN}, "alpha; found nan; expected a finite alpha"),
        ({"alpha_pattern": {"v_proj": INF}}, "v_proj; found inf; expected a finite alpha"),
        ({"dropout": 1.0}, "dropout; found 1.0; expected a probability in [0, 1)"),
        ({"dropout": -0.1}, "dropout; found -0.1"),
        ({"dropout": NAN}, "dropout; found nan"),
        ({"targets": ()}, "targets; found (); expected at least one module name"),
        ({"targets": ""}, "targets; expected at least one module name"),
    ],
)
def test_lora_config_refuses(values, expected):
    with pytest.raises(UserError) as error:
        LoRAConfig(**values)
    assert f"error[config/bad-value] a setting is out of range: {expected}" in message(error, "config/bad-value")


def test_lora_config_takes_any_finite_alpha():
    assert [LoRAConfig(alpha=alpha).alpha for alpha in (-2.0, 0.0, 1e9)] == [-2.0, 0.0, 1e9]


# QuantConfig


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"levels": "nf5"}, "levels; found nf5; expected nf4 or fp4 or int4"),
        ({"levels": "\x1b[2J"}, r"levels; found \x1b[2J; expected nf4"),
        ({"block_size": 16}, "block_size; found 16; expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ({"block_size": 96}, "block_size; found 96; expected one of 32, 64"),
        ({"targets": ()}, "targets; found (); expected at least one module name"),
    ],
)
def test_quant_config_refuses(values, expected):
    with pytest.raises(UserError) as error:
        QuantConfig(**values)
    assert f"error[config/bad-value] a setting is out of range: {expected}" in message(error, "config/bad-value")


def test_quant_config_promises_what_the_arithmetic_takes():
    assert QUANT_BLOCK_SIZES == BLOCK_SIZES
    assert all(len(codebook(QuantConfig(levels=name).levels)) == 16 for name in ("nf4", "fp4", "int4"))
    assert QuantConfig() == QuantConfig(levels="nf4", block_size=64, double_quant=True, targets=ALL_LINEAR)


# RunConfig

COUNTS = ["batch_size", "micro_batch_size", "steps", "eval_every", "save_every", "keep_last", "patience", "log_every"]
BAD_VALUES = [
    *((name, value, "at least 1") for name in COUNTS for value in (0, -1)),
    ("max_length", 7, "at least 8 tokens"),
    ("epochs", 0.0, "a positive number"),
    ("epochs", INF, "a positive number"),
    ("micro_batch_size", 3, "a divisor of --batch-size 8"),
    ("lr", 0.0, "a positive number"),
    ("lr", NAN, "a positive number"),
    ("lr", -1e-4, "a positive number"),
    ("warmup", 1.0, "a share in [0, 1), less than all steps"),
    ("warmup", NAN, "a share in [0, 1)"),
    ("validation_share", 1.0, "a share in [0, 1)"),
    ("validation_share", -0.1, "a share in [0, 1)"),
    ("weight_decay", -0.1, "zero or more"),
    ("weight_decay", INF, "zero or more"),
    ("clip", -1.0, "zero or more"),
    ("clip", NAN, "zero or more"),
    ("beta1", 1.0, "a number in [0, 1)"),
    ("beta2", -0.1, "a number in [0, 1)"),
    ("turns", "first", "all or last"),
    ("method", "qlora2", "lora or full"),
    ("schedule", "step", "cosine or linear or constant or wsd"),
    ("dtype", "fp16", "auto or bf16 or fp32"),
    ("checkpointing", "yes", "none or selective or full"),
    ("quant", "fp4", "none or nf4"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES)
def test_run_config_refuses(name, value, expected):
    with pytest.raises(UserError) as error:
        run_config({**REQUIRED, name: value})
    text = message(error, "config/bad-value")
    assert f"a setting is out of range: --{name.replace('_', '-')}; found {value}; expected {expected}" in text
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"steps": 5, "epochs": 1.0}, "--steps and --epochs; found both; expected one of them"),
        ({"rank": 0}, "rank; found 0; expected a rank of at least 1"),
        ({"alpha": NAN}, "alpha; found nan"),
        ({"dropout": 1.5}, "dropout; found 1.5"),
        ({"targets": []}, "targets; found (); expected at least one module name"),
        ({"decay_share": 0.2}, "--decay-share; found 0.2; expected --schedule wsd; fix: leave --decay-share away"),
        ({"decay_share": 1.5, "schedule": "wsd"}, "--decay-share; found 1.5; expected a share in (0, 1]; fix: 0.1 to 0.2"),
        ({"decay_share": 0.0, "schedule": "wsd"}, "--decay-share; found 0.0; expected a share in (0, 1]; fix: 0.1 to 0.2"),
        (
            {"quant": "nf4", "method": "full"},
            "--quant with --method full; found nf4; expected none; fix: a frozen 4-bit base has",
        ),
    ],
)
def test_run_config_refuses_combinations_and_adapters(values, expected):
    with pytest.raises(UserError) as error:
        run_config({**REQUIRED, **values})
    assert expected in message(error, "config/bad-value")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rank", 8, "nothing"),
        ("alpha", 16.0, "nothing"),
        ("dropout", 0.1, "0"),
        ("use_rslora", True, "nothing"),
        ("use_dora", True, "nothing"),
    ],
)
def test_what_describes_an_adapter_is_refused_where_there_is_none(name, value, expected):
    with pytest.raises(UserError) as error:
        run_config({**REQUIRED, "method": "full", name: value})
    flag = flag_name(name)
    wanted = f"{flag} with --method full; found {value}; expected {expected}; fix: leave {flag} away: there is no adapter"
    assert wanted in message(error, "config/bad-value")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("lr", -1.0, "a positive number"), ("batch_size", 0, "at least 1"), ("max_length", 7, "at least 8")],
)
def test_a_setting_that_another_command_defines_again_keeps_its_limits(name, value, expected):
    with pytest.raises(UserError) as error:
        DPOConfig(**REQUIRED, **{name: value})
    assert f"{flag_name(name)}; found {value}; expected {expected}" in message(error, "config/bad-value")


def test_a_saved_run_in_full_can_be_read_again_and_changed():
    """Its settings name the defaults of an adapter; that is not asking for one."""
    run = run_config({**REQUIRED, "method": "full"})
    assert run_config(json.loads(json.dumps(run.to_dict()))) == run
    assert dataclasses.replace(run, steps=3).steps == 3


@pytest.mark.parametrize("style", ["name", "flag"])
@pytest.mark.parametrize(
    ("typo", "meant"),
    [("rnak", "rank"), ("batchsize", "batch_size"), ("mirco_batch_size", "micro_batch_size"), ("learning_rate_", None)],
)
def test_unknown_key_names_the_nearest(style, typo, meant):
    key = typo if style == "name" else typo.replace("_", "-")
    with pytest.raises(UserError) as error:
        run_config({**REQUIRED, key: 1}, "run.toml")
    text = message(error, "config/unknown-key")
    assert f"unknown setting: run.toml: {key}; fix: " in text
    assert (f"did you mean {meant!r}?" if meant else "known: model, data, out") in text


@pytest.mark.parametrize("missing", [{"model"}, {"data", "out"}, set(REQUIRED)])
def test_missing_settings_are_all_named(missing):
    with pytest.raises(UserError) as error:
        run_config({k: v for k, v in REQUIRED.items() if k not in missing})
    text = message(error, "config/missing")
    assert "expected " + ", ".join(f"--{name}" for name in REQUIRED if name in missing) + "; fix: " in text


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("rank", "16", "int"),
        ("rank", 16.0, "int"),
        ("rank", True, "int"),
        ("batch_size", None, "int"),
        ("model", None, "str"),
        ("model", 3, "str"),
        ("lr", "2e-4", "float"),
        ("alpha", True, "float"),
        ("alpha", 10**400, "float"),
        ("packing", 1, "bool"),
        ("packing", None, "bool"),
        ("targets", "q_proj", "a list of str"),
        ("targets", ["q_proj", 3], "a list of str"),
        ("method", 1, "str"),
        ("rank", {"q_proj": 1}, "int"),
    ],
)
def test_wrong_types_are_named(name, value, kind):
    """Never a traceback, whatever stands in the file."""
    with pytest.raises(UserError) as error:
        run_config({**REQUIRED, name: value}, "run.toml")
    text = message(error, "config/bad-type")
    assert f"a setting has the wrong type: run.toml: {name}; found " in text
    assert f"expected {kind}; fix: minisft train --help explains {flag_name(name)}" in text


def test_hostile_keys_and_values_are_made_visible():
    with pytest.raises(UserError) as error:
        run_config({**REQUIRED, "\x1b[2Jrank": 1})
    assert "\x1b" not in str(error.value)
    with pytest.raises(UserError) as error:
        run_config({**REQUIRED, "method": "\x1b]0;x\x07"})
    assert "\\x1b]0;x\\x07" in str(error.value)


word = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
good_values = st.fixed_dictionaries(
    {"model": word, "data": word, "out": word},
    optional={
        "eval_data": st.none() | word,
        "map": st.lists(word, max_size=3),
        "rank": st.integers(1, 512),
        "alpha": st.integers(-9, 9) | st.floats(-1e9, 1e9),
        "lr": st.none() | st.floats(1e-12, 1.0),
        "steps": st.none() | st.integers(1, 10**9),
        "warmup": st.floats(0, 0.99),
        "targets": st.lists(word, min_size=1, max_size=3),
        "dtype": st.sampled_from(["auto", "bf16", "fp32"]),
        "packing": st.booleans(),
        "seed": st.integers(-(2**62), 2**62),
    },
)


@given(good_values)
def test_round_trip(values):
    """Through JSON and back: what a run saves in its folder is what a resumed run reads."""
    config = run_config(values)
    assert run_config(json.loads(json.dumps(config.to_dict()))) == config
    assert run_config({name.replace("_", "-"): value for name, value in config.to_dict().items()}) == config
    assert set(config.to_dict()) == set(FIELDS)


def test_defaults_are_the_published_interface():
    config = run_config(REQUIRED)
    assert (config.rank, config.alpha, config.batch_size, config.method, config.seed) == (16, 32.0, 8, "lora", 0)
    assert config.peak_lr == 2e-4
    assert run_config({**REQUIRED, "method": "full"}).peak_lr == 2e-5
    assert run_config({**REQUIRED, "lr": 1e-3}).peak_lr == 1e-3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([ALL_LINEAR], ALL_LINEAR),
        (["q_proj"], ("q_proj",)),
        (["model.layers.0.self_attn.q_proj"], ("model.layers.0.self_attn.q_proj",)),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
        (["q_proj|v_proj"], "q_proj|v_proj"),
    ],
)
def test_run_config_says_which_adapter(targets, expected):
    config = run_config({**REQUIRED, "targets": targets, "rank": 3, "alpha": 5, "dropout": 0.1, "use_rslora": True})
    assert config.lora == LoRAConfig(rank=3, alpha=5.0, dropout=0.1, use_rslora=True, targets=expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"double_quant": False}, None),
        ({"quant": "nf4"}, QuantConfig("nf4", 64, True)),
        ({"quant": "nf4", "double-quant": False}, QuantConfig("nf4", 64, False)),
    ],
)
def test_run_config_says_how_the_base_is_held(values, expected):
    assert run_config({**REQUIRED, **values}).quantization == expected


def test_every_field_has_a_type_and_help():
    assert field_type("rank", RunConfig) == (int, False, ())
    assert field_type("lr", RunConfig) == (float, False, ())
    assert field_type("steps", RunConfig) == (int, False, ())
    assert field_type("targets", RunConfig) == (str, True, ())
    assert field_type("packing", RunConfig) == (bool, False, ())
    assert field_type("method", RunConfig) == (str, False, ("lora", "full"))
    assert flag_name("micro_batch_size") == "--micro-batch-size"
    for name, field in FIELDS.items():
        kind, is_tuple, _ = field_type(name, RunConfig)
        assert kind in (str, int, float, bool)
        assert field.metadata["help"]
        if field.default not in (dataclasses.MISSING, None):
            values = field.default if is_tuple else (field.default,)
            assert all(type(value) is kind for value in values)


# TOML


def test_read_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\ndata = "d"\nout = "o"\nbatch-size = 4\nlr = 1e-3\ntargets = ["q_proj"]\n', encoding="utf-8")
    assert read_toml(path) == tomllib.loads(path.read_text(encoding="utf-8"))
    assert run_config(read_toml(path)) == RunConfig("m", "d", "o", batch_size=4, lr=1e-3, targets=("q_proj",))


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (None, "config/no-file", "No such file or directory"),
        (b"rank = ", "config/bad-toml", "the settings are not TOML"),
        (b"rank = 1\nrank = 2", "config/bad-toml", "Cannot overwrite a value"),
        (b'model = "\xff"', "config/bad-toml", "can't decode byte 0xff"),
        (b"rank = " + b"[" * 100_000, "config/bad-toml", "recursion"),
        (b'data = "a\\u0000b"', "config/bad-toml", "U+0000 in data"),
    ],
    ids=["absent", "broken", "twice", "not-utf8", "deep", "null"],
)
def test_toml_that_cannot_be_read(tmp_path, content, code, expected):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_toml(path)
    text = message(error, code)
    assert "run.toml" in text
    assert expected in text


def test_toml_folder(tmp_path):
    with pytest.raises(UserError) as error:
        read_toml(tmp_path)
    assert "Is a directory" in message(error, "config/no-file")


def test_a_section_is_an_unknown_setting(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[lora]\nrank = 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown setting: run\.toml: lora"):
        run_config(read_toml(path), "run.toml")
