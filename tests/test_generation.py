"""Generation: the KV cache changes nothing, neighbours change nothing, every eos stops, sampling follows its formula."""

import contextlib
import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minisft import generation
from minisft.common.errors import UserError
from minisft.config import ModelConfig
from minisft.generation import (
    ChatCache,
    Sampling,
    TextStream,
    generate,
    no_dropout,
    read_prompts,
    safe_text,
    sample_groups,
    stream_chat,
)
from minisft.model import CausalLM

VOCAB = 23
CONTEXT = 48
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=CONTEXT,
)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """Random weights large enough that the next token depends on everything before it."""
    draw = torch.Generator().manual_seed(5)
    tiny = CausalLM(CONFIG).double()
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.6)
    return tiny.requires_grad_(False)


tokens = st.integers(0, VOCAB - 1)
# Some begin alike, by as much as may be shared or more.
prompt_lists = st.builds(
    lambda beginning, rests: [beginning + rest for rest in rests],
    st.just([]) | st.lists(tokens, min_size=6, max_size=12),
    st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=6),
)


def by_recomputation(model: CausalLM, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding without a cache or a batch: the whole text runs through the model for each token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
@given(prompt_lists, st.integers(1, 8), st.integers(1, 4))
def test_cache_equals_recomputation(model, prompts, steps, batch_size):
    found = generate(model, prompts, max_new_tokens=steps, eos_ids=(), batch_size=batch_size)
    assert found == [by_recomputation(model, prompt, steps) for prompt in prompts]


def test_a_common_beginning_is_read_once(model):
    """Counted in tokens that go through the model; every prompt keeps one of its own."""
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    beginning = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    try:
        read_prompts(model, [[*beginning, 11, 12], [*beginning, 13], beginning], 1)
        read_prompts(model, [beginning[:5], [*beginning[:4], 12]], 1)  # too short to be worth it
        read_prompts(model, [beginning, [13], beginning], 1)  # equal ones are read once, whatever stands between
        read_prompts(model, [beginning], 1)
    finally:
        hook.remove()
    assert seen == [9, 3 * 3, 2 * 5, 2 * 10, 10]


@pytest.mark.slow
@given(prompt_lists, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
def test_cached_states_equal_uncached(model, prompts, continuation):
    cache, hidden = read_prompts(model, prompts, len(continuation))
    for n in range(len(continuation) + 1):
        for row, prompt in enumerate(prompts):
            whole = model.hidden(torch.tensor([[*prompt, *continuation[:n]]]))[0, -1]
            torch.testing.assert_close(hidden[row], whole, rtol=1e-11, atol=1e-11)
        if n < len(continuation):
            hidden = model.hidden(torch.tensor([[continuation[n]]] * len(prompts)), cache=cache)[:, 0]


@pytest.mark.slow
@given(prompt_lists, st.integers(2, 6), st.floats(0.2, 3), st.floats(0.1, 1), st.integers(0, 5), st.integers(0, 99))
def test_a_row_does_not_depend_on_its_batch(model, prompts, batch_size, temperature, top_p, top_k, seed):
    settings = {
        "max_new_tokens": 6,
        "eos_ids": (1, 2),
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    alone = generate(model, prompts, batch_size=1, **settings)
    assert generate(model, prompts, batch_size=batch_size, **settings) == alone


@pytest.mark.slow
@given(prompt_lists, st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=6))
def test_every_eos_stops_and_only_eos_does(model, prompts, eos_ids):
    for free, stopped in zip(
        generate(model, prompts, max_new_tokens=12, eos_ids=()),
        generate(model, prompts, max_new_tokens=12, eos_ids=eos_ids),
        strict=True,
    ):
        ends = [place for place, token in enumerate(free) if token in eos_ids]
        assert stopped == (free[: ends[0] + 1] if ends else free)


def test_the_context_is_the_limit(model):
    prompts = [[3] * (CONTEXT - 2), [4] * 5, [5] * (CONTEXT - 1)]
    lengths = [len(ids) for ids in generate(model, prompts, max_new_tokens=9, eos_ids=())]
    assert lengths == [2, 9, 1]


def test_on_token_tells_everything(model):
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}
    answers = generate(
        model, [[1], [2, 3], [4]], max_new_tokens=5, eos_ids=(7,), batch_size=2, on_token=lambda i, t: told[i].append(t)
    )
    assert list(told.values()) == answers


def test_on_token_may_end_a_row(model):
    """The others go on as if nothing had happened."""
    prompts = [[1], [2, 3], [4]]
    whole = generate(model, prompts, max_new_tokens=6, eos_ids=())
    told = dict.fromkeys(range(3), 0)

    def ends(index: int, token: int) -> bool:
        told[index] += 1
        return index == 1 and told[1] == 2

    answers = generate(model, prompts, max_new_tokens=6, eos_ids=(), on_token=ends)
    assert answers == [whole[0], whole[1][:2], whole[2]]
    assert list(told.values()) == [6, 2, 6]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"batch_size": 0},
    ],
)
def test_bad_settings_are_refused(model, settings):
    with pytest.raises(UserError, match="config/bad-value"):
        generate(model, [[1]], **({"max_new_tokens": 3, "eos_ids": ()} | settings))


@pytest.mark.parametrize("prompt", [[], [1] * CONTEXT])
def test_bad_prompts_are_refused(model, prompt):
    with pytest.raises(UserError, match="prompt 2"):
        generate(model, [[1], prompt], max_new_tokens=3, eos_ids=())


def by_hand(logits: list[float], temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """The distribution in plain Python floats: sort, cut to k, softmax, cut to p, renormalise."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    kept: dict[int, float] = {}
    for i, weight in zip(order, weights, strict=True):
        if sum(kept.values()) >= top_p * sum(weights):
            break
        kept[i] = weight
    return {i: weight / sum(kept.values()) for i, weight in kept.items()}


@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=12, unique=True),
    st.floats(0.1, 4),
    st.floats(0.05, 1),
    st.integers(0, 14),
)
def test_the_distribution_is_the_formula(logits, temperature, top_p, top_k):
    expected = by_hand(logits, temperature, top_p, top_k)
    assume(abs(sum(sorted(by_hand(logits, temperature, 1.0, top_k).values())[-len(expected) :]) - top_p) > 1e-9)
    p, ids = Sampling(temperature, top_p, top_k).distribution(torch.tensor([logits], dtype=torch.float64))
    found = {int(i): float(x) for i, x in zip(ids[0], p[0], strict=True) if x > 0}
    assert found == pytest.approx({i: x for i, x in expected.items() if x > 0}, rel=1e-9, abs=1e-15)


@pytest.mark.slow
def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = Sampling(temperature=1.0, top_k=3, seed=11)
    n = 4000
    counts = Counter(int(sampling.choose(logits, [0], step)) for step in range(n))
    for token, share in by_hand(logits[0].tolist(), 1.0, 1.0, 3).items():
        assert abs(counts[token] / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert 3 not in counts


@pytest.mark.parametrize("likeliest", [1, 4, VOCAB - 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_of_a_large_vocabulary_follow_the_distribution(monkeypatch, likeliest, temperature):
    """Not sorted as a whole: as random numbers take 2000 even steps from 0 to 1, each token gets its share of them."""
    monkeypatch.setattr("minisft.generation.LIKELIEST", likeliest)
    n = 2000
    monkeypatch.setattr("minisft.generation.derive_seed", lambda _seed, _use, prompt, _step: (2 * prompt + 1) * 2**62 // n)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul(2).bfloat16()
    logits[3] = logits[5] = logits.max()  # ties have no order
    logits[7] = -torch.inf
    counts = Sampling(temperature).choose(logits.expand(n, -1), range(n), 0).bincount(minlength=VOCAB)
    shares = (logits.double() / temperature).softmax(-1)
    assert (counts / n - shares).abs().max() <= 1.01 / n
    assert counts[7] == 0


def test_a_draw_past_the_sum_is_a_token_with_a_share(monkeypatch):
    """u just below 1, the sum of the shares rounded down."""
    monkeypatch.setattr("minisft.generation.LIKELIEST", 2)
    monkeypatch.setattr("minisft.generation.derive_seed", lambda *_: 2**63 - 1)
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf, -torch.inf]])
    assert Sampling(1.0).choose(logits, [0], 0).item() in (1, 2)


def test_one_candidate_is_greedy(model):
    prompts = [[1, 2], [3]]
    greedy = generate(model, prompts, max_new_tokens=6, eos_ids=())
    assert generate(model, prompts, max_new_tokens=6, eos_ids=(), temperature=2.0, top_k=1) == greedy
    assert generate(model, prompts, max_new_tokens=6, eos_ids=(), temperature=1.0, top_p=1e-9) == greedy


def test_no_dropout_gives_every_module_its_mode_back(model):
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with contextlib.suppress(KeyboardInterrupt), no_dropout(model):
        assert not any(m.training for m in model.modules())
        raise KeyboardInterrupt
    assert [m.training for m in model.modules()] == before


class ByteTokenizer:
    """Every byte is a token: the hardest case for a stream."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=30))
def test_the_stream_says_everything_and_never_half_a_character(text):
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text
    assert pieces[: len(text)] == list(text) or not text.isascii()  # ASCII comes at once


def test_a_cut_character_comes_out_at_the_end():
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(byte) for byte in "aé".encode()[:2]]
    assert (pieces, stream.finish(), stream.finish()) == (["a", ""], "\ufffd", "")


def test_the_terminal_is_safe():
    assert safe_text("a\tb\n\x1b[31mred\x07\x9b\u202e!") == "a\tb\n\\x1b[31mred\\x07\\x9b\\u202e!"


def test_chat_streams_what_generate_says():
    config = ModelConfig(**{**CONFIG.__dict__, "vocab_size": 256})
    torch.manual_seed(1)
    wide = CausalLM(config).double()
    [expected] = generate(wide, [[5, 6, 7]], max_new_tokens=20, eos_ids=(0,))
    shown: list[str] = []
    answer = stream_chat(wide, ByteTokenizer(), [5, 6, 7], shown.append, max_new_tokens=20, eos_ids=(0,), sampling=Sampling())
    assert answer == bytes(t for t in expected if t).decode(errors="replace")
    assert "".join(shown) == safe_text(answer)


turns = st.lists(
    st.tuples(st.integers(0, 30), st.lists(tokens, min_size=1, max_size=5), st.integers(1, 4)), min_size=1, max_size=5
)


@pytest.mark.slow
@given(turns)
def test_every_turn_of_a_chat_says_what_it_says_when_read_whole(model, turns):
    """A turn keeps some of what was read and said, all of it or less as after an edit, and adds to it."""
    kept, text = ChatCache(), []
    for stays, new, steps in turns:
        prompt = [*text[:stays], *new]
        if len(prompt) + steps > CONTEXT:
            break
        with torch.inference_mode():
            cache, hidden = kept.read(model, [prompt], steps)
        torch.testing.assert_close(hidden[0], model.hidden(torch.tensor([prompt]))[0, -1], rtol=1e-11, atol=1e-11)
        assert (kept.ids, cache.lengths.tolist(), cache.max_length) == (prompt, [len(prompt)], len(prompt) + steps)
        answer = generation._scored_tokens(model, {0: prompt}, steps, (), Sampling(), scored=False, kept=kept)
        said = [token for _, token, _, _ in answer]
        assert said == by_recomputation(model, prompt, steps)
        text = [*prompt, *said]
        assert kept.ids == text[:-1]  # nobody has read the last token yet


def test_a_turn_of_a_chat_reads_what_is_new(model, monkeypatch):
    read = []
    hidden = CausalLM.hidden
    monkeypatch.setattr(CausalLM, "hidden", lambda self, ids, **kw: (read.append(ids.numel()), hidden(self, ids, **kw))[1])
    kept, first = ChatCache(), [1, 2, 3, 4, 5, 6, 7]
    with torch.inference_mode():
        kept.read(model, [first], 4)
        kept.read(model, [[*first, 8, 9, 10]], 4)
        kept.read(model, [[*first, 8, 9, 10]], 4)  # the same once more: the last token's state is asked for
        kept.read(model, [[*first[:3], 11, 12]], 4)  # edited
        kept.read(model, [[13]], 4)
    assert read == [7, 3, 1, 2, 1]


# ---- groups of sampled answers ----


@pytest.mark.slow
@given(prompt_lists, st.integers(1, 3), st.integers(1, 6), st.sampled_from([0.7, 1.0, 1.6]), st.sets(tokens, max_size=3))
def test_what_was_sampled_is_what_is_scored(model, prompts, G, steps, temperature, eos_ids):
    """Log-probabilities noted at the cache equal those of the whole text read at once, by hand; so do the entropies."""
    groups = sample_groups(
        model, prompts, G, max_new_tokens=steps, eos_ids=eos_ids, temperature=temperature, seed=3, batch_size=4
    )
    for prompt, group in zip(prompts, groups, strict=True):
        for answer in group:
            logits = model(torch.tensor([prompt + answer.ids]))[0, len(prompt) - 1 : -1] / temperature
            log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
            wanted = [float(log_probs[i, token]) for i, token in enumerate(answer.ids)]
            assert answer.log_probs == pytest.approx(wanted, abs=1e-9)
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            assert answer.entropy == pytest.approx(float(entropy), abs=1e-9)
            ended = [i for i, token in enumerate(answer.ids) if token in eos_ids]
            assert ended == ([len(answer.ids) - 1] if answer.stopped(eos_ids) else [])
            assert answer.stopped(eos_ids) or len(answer.ids) == steps


@pytest.mark.slow
def test_a_sample_does_not_depend_on_the_batch(model):
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [4]]
    settings = {"max_new_tokens": 6, "eos_ids": {0}, "seed": 8}
    groups = [sample_groups(model, prompts, 4, batch_size=size, **settings) for size in (1, 3, 12)]
    ids = [[[answer.ids for answer in group] for group in found] for found in groups]
    assert ids[0] == ids[1] == ids[2]
    some = sample_groups(model, [prompts[2], prompts[0]], 4, numbers=[2, 0], **settings)  # a part, which keeps its numbers
    assert [[answer.ids for answer in group] for group in some] == [ids[0][2], ids[0][0]]
    assert len({tuple(answer) for answer in ids[0][0]}) > 1  # the answers of a group are draws of their own
    assert ids[0] != [[a.ids for a in g] for g in sample_groups(model, prompts, 4, **{**settings, "seed": 9})]


def test_a_group_reads_its_prompt_once(model, monkeypatch):
    read = []
    hidden = CausalLM.hidden
    monkeypatch.setattr(CausalLM, "hidden", lambda self, ids, **kw: (read.append(ids.numel()), hidden(self, ids, **kw))[1])
    sample_groups(model, [[1, 2, 3], [4, 5, 6]], 5, max_new_tokens=1, eos_ids=())
    assert sum(read) == 6


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"temperature": math.nan}, {"num_answers": 0}, {"max_new_tokens": 0}])
def test_bad_settings_of_a_group(model, bad):
    with pytest.raises(UserError, match="out of range"):
        sample_groups(model, [[1]], **{"num_answers": 2, "max_new_tokens": 1, "eos_ids": (), **bad})
