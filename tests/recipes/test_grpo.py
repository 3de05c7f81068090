"""Rollouts against ``generate``, advantages against brute force, rewards that fail, exact resume, bad input."""

import csv
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolute.data.completions import PackedPairs
from evolute.data.tokenizers import CharTokenizer
from evolute.models.advantages import group_advantages
from evolute.recipes.llm.finetune import add_lora, merged_weights, without_lora
from evolute.recipes.llm.network import build
from evolute.recipes.llm.passes import pass_at_k
from evolute.recipes.llm.policy import completion_states
from evolute.recipes.llm.rewards import Rewards
from evolute.recipes.llm.rollouts import _decode, _OwnForward, draw_uniforms, sample_completions
from evolute.recipes.llm.sft import completion_loss

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"model_type": "llama", **TINY, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", **TINY, "num_key_value_heads": 4, "max_position_embeddings": 64},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def network(family: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    model = build(FAMILIES[family], 20, None, "sdpa").eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(6)  # far from uniform, so that greedy choices are no matter of rounding
    return model


def prompts(count: int = 7):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 19, (n % 5 + 1,), generator=generator).tolist() for n in range(count)]


def generated(model, texts, group, tokens, eos):
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in texts]).repeat_interleave(group, 0)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in texts]).repeat_interleave(group, 0)
    out = model.generate(
        ids, attention_mask=seen, max_new_tokens=tokens, do_sample=False, eos_token_id=eos, pad_token_id=0
    )[:, width:]
    return torch.nn.functional.pad(out, (0, tokens - out.shape[1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_greedy_completions_are_those_of_generate(family, lora):
    model = network(family)
    if lora:
        add_lora(model, {"r": 2})
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.5)
    end = int(generated(model, prompts()[:1], 1, 3, 99)[0, 2])  # a token that does come
    found = sample_completions(model, prompts(), 2, 9, 1.0, None, end)
    wanted = generated(model, prompts(), 2, 9, end)
    assert torch.equal(torch.where(found.mask, found.ids - wanted, 0), torch.zeros_like(wanted))
    assert torch.equal(found.finished, ((found.ids == end) & found.mask).any(1))
    assert found.finished.any()


def test_draws_follow_the_policy_and_their_log_probabilities_are_its_own():
    model = network()
    texts, temperature = prompts(), 0.7
    uniforms = draw_uniforms(0, 0, range(7), 3, 6)
    fast = sample_completions(model, texts, 3, 6, temperature, uniforms, 3)
    with torch.no_grad():
        slow = _decode(_OwnForward(model), texts, 3, 6, temperature, uniforms, 3)
    assert torch.equal(fast.ids, slow.ids)
    assert torch.equal(fast.mask, slow.mask)
    torch.testing.assert_close(fast.log_probs, slow.log_probs, rtol=1e-4, atol=1e-5)
    for row in range(21):  # one sequence at a time, without padding or cache
        prompt, length = texts[row // 3], int(fast.mask[row].sum())
        ids = torch.tensor([prompt + fast.ids[row, :length].tolist()])
        with torch.no_grad():
            log_p = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        wanted = log_p[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(fast.log_probs[row, :length], wanted, rtol=1e-4, atol=1e-5)


def test_draws_have_the_frequencies_of_the_softmax():
    from evolute.recipes.llm.rollouts import draw

    scores = torch.tensor([0.3, -1.0, 2.0, 0.0])
    tokens, _ = draw(scores.expand(20000, 4), 0.8, draw_uniforms(0, 0, [0], 20000, 1)[:, 0])
    frequencies = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(frequencies, (scores / 0.8).softmax(-1), atol=0.012, rtol=0)


def test_draws_of_a_prompt_do_not_depend_on_the_others():
    model = network()
    whole = sample_completions(model, prompts(), 2, 6, 1.0, draw_uniforms(5, 2, range(7), 2, 6), 3)
    alone = sample_completions(model, prompts()[4:5], 2, 6, 1.0, draw_uniforms(5, 2, [4], 2, 6), 3)
    assert torch.equal(whole.ids[8:10], alone.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_completions_are_at_the_positions_that_predict_them(family):
    model = network(family).double()
    ids = torch.tensor([[4, 5, 6, 7, 8, 0], [1, 2, 3, 0, 0, 0]])
    batch = {"input_ids": ids, "prompt_length": torch.tensor([2, 1]), "actions": torch.tensor([[6, 7, 8], [2, 3, 0]])}
    plain, whole = completion_states(model, batch), completion_states(model, batch, pieces=True)
    logits = plain["head"](plain["hidden"])
    torch.testing.assert_close(logits, whole["logits"])
    torch.testing.assert_close(plain["hidden"], whole["hidden"])
    for row, (start, tokens) in enumerate([(2, [4, 5, 6, 7, 8]), (1, [1, 2, 3])]):
        alone = model(input_ids=torch.tensor([tokens])).logits[0, start - 1 : -1]
        torch.testing.assert_close(logits[row, : len(alone)], alone)


def test_packed_pairs_do_not_see_each_other():
    model = network().double()
    pairs = [([1, 2, 3, 4], [-100, -100, 3, 4]), ([5, 6, 7], [-100, 6, 7]), ([8, 9, 1, 2, 3], [-100, 9, 1, 2, 3])]
    packed, single = (PackedPairs(pairs, 13, packing) for packing in (True, False))
    assert (len(packed), len(single)) == (1, 3)
    (one, _, _), (three, _, _) = (completion_loss(model, rows[torch.arange(len(rows))]) for rows in (packed, single))
    torch.testing.assert_close(one, three, rtol=1e-10, atol=1e-12)
    first_lies = [([9, 9, 9, 4], pairs[0][1]), *pairs[1:]]
    assert completion_loss(model, PackedPairs(first_lies, 13, True)[torch.arange(1)])[0] != one


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_packing_keeps_every_label_once(sizes):
    pairs = [([n] * n, [-100] + [n] * (n - 1)) for n in sizes]
    rows = PackedPairs(pairs, 9, packing=True)
    labels = rows[torch.arange(len(rows))]["labels"]
    for n in set(sizes):
        assert int((labels == n).sum()) == (n - 1) * sizes.count(n)
    assert len(rows) <= len(sizes)


VALUES = st.lists(st.one_of(st.sampled_from([0.0, 1.0, -2.5]), st.just(math.nan)), min_size=4, max_size=4)


@settings(deadline=None, max_examples=40)
@given(st.lists(VALUES, min_size=1, max_size=4))
def test_advantages_equal_their_definition(rows):
    rewards = torch.tensor(rows, dtype=torch.float64)
    for baseline, scale in itertools.product(("mean", "median", "leave_one_out"), ("group", "none", "batch")):
        found, equal = group_advantages(rewards, baseline, scale, eps=1e-4)
        known_all = [v for row in rows for v in row if not math.isnan(v)]
        for i, row in enumerate(rows):
            known = [v for v in row if not math.isnan(v)]
            same = len(set(known)) < 2
            assert bool(equal[i]) == same
            for j, value in enumerate(row):
                wanted = 0.0
                if not math.isnan(value) and not same:
                    others = known.copy()
                    others.remove(value)
                    centre = {
                        "mean": statistics.fmean(known),
                        "median": statistics.median_low(known),
                        "leave_one_out": statistics.fmean(others),
                    }[baseline]
                    size = {"group": known, "none": None, "batch": known_all}[scale]
                    wanted = (value - centre) / (1.0 if size is None else statistics.stdev(size) + 1e-4)
                assert float(found[i, j]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_pass_at_k_counts_the_subsets():
    tries = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    for k in range(1, 6):
        wanted = [statistics.fmean(any(s) for s in itertools.combinations(row, k)) for row in tries.tolist()]
        assert pass_at_k(tries, k).tolist() == pytest.approx(wanted)
    with pytest.raises(ValueError, match="k=6"):
        pass_at_k(tries, 6)


def length(completions, **_):
    return [len(c) for c in completions]


async def slowly(completions):
    import asyncio

    await asyncio.sleep(0.01)
    return [None if c == "no" else 1.0 for c in completions]


def broken(**_):
    raise RuntimeError("the judge is away")


def late(completions, **_):
    time.sleep(5)
    return [0.0] * len(completions)


async def very_late(completions, **_):
    import asyncio

    await asyncio.sleep(5)


def short(completions, **_):
    return [1.0]


def test_rewards_are_weighted_and_missing_ones_left_out():
    scores = Rewards([length, slowly], [1.0, 10.0])(["p"] * 3, ["abc", "no", ""], [[1]] * 3, {"answer": [1, 2, 3]})
    assert scores.total.tolist() == [13.0, 2.0, 10.0]
    assert scores.each[1].isnan().tolist() == [False, True, False]
    assert scores.failed == []


@pytest.mark.parametrize("function", [broken, late, very_late, short])
def test_a_reward_that_fails_is_named_counted_and_scores_none(function):
    rewards = Rewards([length, function], timeout=0.2)
    with pytest.warns(UserWarning, match=f"reward {function.__name__} failed"):
        scores = rewards(["p"] * 2, ["abc", "no"], [[1]] * 2, {})
    assert scores.total.tolist() == [3.0, 2.0]
    assert scores.failed == [function.__name__]
    assert rewards.failures == {"length": 0, function.__name__: 1}
    alone = Rewards([function], timeout=0.2)
    with pytest.warns(UserWarning, match="failed"):
        assert alone(["p"] * 2, ["abc", "no"], [[1]] * 2, {}).total.isnan().all()


def test_adapters_can_be_left_out_and_merged():
    model = network()
    bare = model(torch.tensor([[1, 2, 3]])).logits
    config = model.config.to_dict()
    add_lora(model, {"r": 2})
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    adapted = model(torch.tensor([[1, 2, 3]])).logits
    with without_lora(model):
        torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, bare)
    assert asked == {n: p.requires_grad for n, p in model.named_parameters()}
    assert not torch.allclose(adapted, bare, atol=1e-2)
    state = {"model." + k: v for k, v in model.state_dict().items()}
    merged = network()
    merged.load_state_dict(merged_weights({"state_dict": state, "hf_config": config, "lora": {"r": 2}}))
    torch.testing.assert_close(merged(torch.tensor([[1, 2, 3]])).logits, adapted, rtol=1e-4, atol=1e-4)


def test_characters_are_ids_and_strange_ones_are_named():
    tokenizer = CharTokenizer("0123456789+=")
    assert tokenizer.decode([*tokenizer.encode("12+3="), tokenizer.eos_id]) == "12+3="
    with pytest.raises(ValueError, match="has no 'x'"):
        tokenizer.encode("1x")
    with pytest.raises(ValueError, match="every character once"):
        CharTokenizer("00")


SMALL = [
    "--model.init_args.config", json.dumps({"model_type": "llama", **TINY, "max_position_embeddings": 64}),
    "--model.init_args.cold_start", "{steps: 60, corrupt_steps: 10, batch_size: 16, cache: ''}",
    "--model.init_args.group_size", "4", "--model.init_args.inner_epochs", "2", "--model.init_args.minibatches", "2",
    "--model.init_args.kl_coef", "0.01", "--model.init_args.log_completions", "1",
    "--data.init_args.source_args", "{size: 200, min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    "--data.init_args.batch_size", "4", "--data.init_args.max_val", "16",
    "--trainer.val_check_interval", "6", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--trainer.callbacks", "null",
]  # fmt: skip


def run(folder: Path, steps: int, *more: str) -> None:
    from evolute.cli import train
    from evolute.registry import resolve

    arguments = ["--config", str(resolve("llm/grpo")), "--run", str(folder), "--trainer.max_steps", str(steps)]
    assert train("fit", [*arguments, "--checkpoint_every", "5", *SMALL, *more], ["llm/grpo"]) == 0


CAPO = [{"class_path": "evolute.callbacks.CAPO", "init_args": {"delta_f": 1e-6, "delta_h": 1e-3}}]


def test_a_run_resumed_in_the_middle_of_a_rollout_equals_one_that_was_not(tmp_path):
    """Five steps are one whole rollout of four batches and a quarter of the next; CAPO brings moments of its own."""
    gate = ("--trainer.callbacks", json.dumps(CAPO))
    run(tmp_path / "whole", 11, *gate)
    run(tmp_path / "cut", 5, *gate)
    run(tmp_path / "cut", 11, "--resume", "true", *gate)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step=00000011.ckpt", weights_only=True)
        for name in ("whole", "cut")
    ]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    gates = [next(v for k, v in state["callbacks"].items() if k.startswith("CAPO")) for state in states]
    assert gates[0]["steps_seen"] == gates[1]["steps_seen"] == 11
    assert len(gates[0]["moments"]) > 2
    for name, value in gates[0]["moments"].items():
        assert (
            torch.equal(value, gates[1]["moments"][name])
            if torch.is_tensor(value)
            else (value == gates[1]["moments"][name])
        ), name
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        rejected = [float(row["capo/reject_frac"]) for row in csv.DictReader(file) if row.get("capo/reject_frac")]
    assert 0 < statistics.fmean(rejected) < 1  # the gate had something to say
    tables = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert tables[0] == tables[1]
    assert "val/pass@1" in (tmp_path / "whole" / "metrics.csv").read_text()
    assert "token by token" in (tmp_path / "whole" / "report.html").read_text()


BAD = [
    (["--model.init_args.rewards", "[no.such.function]"], "'no.such.function' cannot be imported"),
    (["--model.init_args.reward_weights", "[1.0, 2.0]"], "as many weights"),
    (["--data.init_args.context", "2"], "context=2"),
    (["--model.init_args.max_completion", "100"], "the model has 64"),
    (["--model.init_args.pass_k", "9"], "pass_k=9"),
    (["--model.init_args.minibatches", "3"], "minibatches=3 does not divide"),
    (["--data.init_args.source", "reasoning-gym/no_such_task"], "reasoning-gym/no_such_task"),
    (["--data.init_args.prompt_template", "{nothing}"], "prompt_template='{nothing}'"),
    (["--model.init_args.lora", "{rank: 3}"], "peft refuses it"),
    (["--model.init_args.init_from", "missing.ckpt"], "no such checkpoint"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    from evolute.cli import train
    from evolute.registry import resolve

    monkeypatch.chdir(tmp_path)
    given = ["--config", str(resolve("llm/grpo")), *SMALL, "--trainer.max_steps", "2", *arguments]
    assert train("fit", given, ["llm/grpo"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "runs").exists()


def test_the_table_of_completions_reaches_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path / "logged", 2, "--trainer.callbacks", json.dumps(CAPO), "--wandb", "true")
    tables = list((tmp_path / "logged").glob("wandb/**/media/table/completions*.table.json"))
    assert tables
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["step", "prompt", "completion", "reward", "advantage"]
    rows = [json.loads(line) for line in (tmp_path / "logged" / "completions.jsonl").read_text().splitlines()]
    assert [(row[0], row[1], row[3]) for row in table["data"]] == [
        (row["step"], row["prompt"], row["reward"]) for row in rows[: len(table["data"])]
    ]
    assert len({row["prompt"] for row in rows}) > 1
    assert {row[2] for row in table["data"]} == {"Html"}  # wandb's stand-in: the page itself travels as an artifact
