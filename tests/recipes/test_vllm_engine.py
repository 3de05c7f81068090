"""The vLLM engine against a module with vLLM's public names that answers from the weights it was given."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evolute.recipes.llm.finetune import add_lora
from evolute.recipes.llm.network import build
from evolute.recipes.llm.rollouts import draw, draw_uniforms, sample_completions
from evolute.recipes.llm.vllm_engine import VLLMEngine

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
PROMPTS = [[1, 2, 3], [4], [5, 6]]


class SamplingParams:
    def __init__(
        self, *, n=1, temperature=1.0, seed=None, max_tokens=16, logprobs=None, stop_token_ids=None, detokenize=True
    ):
        self.n, self.temperature, self.seed, self.max_tokens = n, temperature, seed, max_tokens
        assert logprobs == 0  # of the drawn token alone
        assert not detokenize  # there is no tokenizer
        self.stop = stop_token_ids


class Served(torch.nn.Module):
    """What vLLM calls the model: it takes pairs of names and weights."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def load_weights(self, weights):
        state = self.inner.state_dict()
        names = set()
        for name, value in weights:
            state[name].copy_(value)
            names.add(name)
        return names


class LLM:
    made = 0

    def __init__(self, model, *, load_format, skip_tokenizer_init, logprobs_mode, dtype, **options):
        assert (load_format, skip_tokenizer_init, logprobs_mode) == ("dummy", True, "processed_logprobs")
        assert dtype == "float32"
        LLM.made += 1
        LLM.options = options
        self.served = Served(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval())
        self.stale = True

    def apply_model(self, func):
        self.stale = True
        return [func(self.served)]

    def reset_prefix_cache(self):
        self.stale = False
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert not self.stale
        return [
            SimpleNamespace(outputs=[self._one(prompt["prompt_token_ids"], params, i) for i in range(params.n)])
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _one(self, prompt, params, number):
        ids, tokens, logprobs = list(prompt), [], []
        generator = torch.Generator().manual_seed((params.seed or 0) + number)
        for _ in range(params.max_tokens):
            scores = self.served.inner(torch.tensor([ids])).logits[:, -1]
            uniform = torch.rand(1, generator=generator) if params.temperature else None
            token, log_p = (t.item() for t in draw(scores, params.temperature or 1.0, uniform))
            ids.append(token)
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=log_p)})
            if token in params.stop:
                break
        reason = "stop" if tokens[-1] in params.stop else "length"
        return SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=reason)


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    LLM.made = 0


def network(lora: bool):
    torch.manual_seed(0)
    model = build(LLAMA, 20, None, "sdpa").eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(6)
    if lora:
        add_lora(model, {"r": 2})
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_greedy_completions_are_those_of_the_default_engine_also_after_the_weights_moved(vllm, lora):
    model, engine = network(lora), VLLMEngine(gpu_memory_utilization=0.3)
    for _ in range(2):
        ours = sample_completions(model, PROMPTS, 2, 7, 1.0, None, 3)
        theirs = engine(model, PROMPTS, 2, 7, 1.0, None, 3)
        for name in ("ids", "mask", "finished"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.3)
    assert LLM.made == 1
    assert LLM.options["gpu_memory_utilization"] == 0.3


def test_draws_repeat_with_their_uniforms_and_differ_within_a_group(vllm):
    model, engine = network(False), VLLMEngine()
    first, again, other = (
        engine(model, PROMPTS, 4, 6, 0.7, draw_uniforms(0, number, range(3), 4, 6), 3) for number in (0, 0, 1)
    )
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    assert len(first.ids[:4].unique(dim=0)) > 1


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"evolute\[vllm\]"):
        VLLMEngine()
