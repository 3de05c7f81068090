"""How fast are rollouts of the default model beside transformers' generate?

.venv/bin/python benchmarks/grpo_rollouts.py [--rounds 9]

The model of ``llm/grpo`` after its supervised start and its rollout (16 prompts of chain_sum, 16 completions each, 5
tokens), and longer ones, one thread, process CPU time, interleaved, the median of the rounds. Greedy outputs must be
equal. With sampling both draw at temperature 1 and to the same lengths: the end token is one that never comes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evolute.data import PromptDataModule
from evolute.recipes.llm.cold_start import ColdStart, cold_start
from evolute.recipes.llm.network import build
from evolute.recipes.llm.rollouts import draw_uniforms, sample_completions

BAR = 3.0
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
TASK = {"size": 8000, "seed": 0, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


@torch.no_grad()
def generate(model: Any, prompts: list[list[int]], group: int, tokens: int, sample: bool, end: int) -> Tensor:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).repeat_interleave(group, 0)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(group, 0)
    out = model.generate(
        ids, attention_mask=seen, max_new_tokens=tokens, do_sample=sample, eos_token_id=end, pad_token_id=0
    )[:, width:]
    return torch.nn.functional.pad(out, (0, tokens - out.shape[1]))


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = PromptDataModule(
        "reasoning-gym/chain_sum", TASK, "chars:0123456789+-= ", "{metadata[expression]}=", 16, 16, 256
    )
    data.setup()
    model = build(LLAMA, None, data.tokenizer, "sdpa").eval()
    never = 63
    cold_start(model, data.train_examples, data.tokenizer, ColdStart())
    worst, equal = float("inf"), True
    for group, tokens in ((16, 5), (16, 16), (16, 48), (2, 48)):
        prompts = data._batch(data.train_examples, list(range(16)))["ids"]
        ours = sample_completions(model, prompts, group, tokens, 1.0, None, data.tokenizer.eos_id)
        theirs = generate(model, prompts, group, tokens, False, data.tokenizer.eos_id)
        equal &= bool(((ours.ids == theirs) | ~ours.mask).all())
        uniforms = draw_uniforms(0, 0, range(16), group, tokens)
        pairs = [
            (
                seconds(sample_completions, model, prompts, group, tokens, 1.0, uniforms, never),
                seconds(generate, model, prompts, group, tokens, True, never),
            )
            for _ in range(rounds + 1)
        ][1:]
        fast, slow = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(s / f for f, s in pairs)
        worst = min(worst, ratio) if (group, tokens) == (16, 5) else worst
        count = 16 * group * tokens
        print(
            f"{16 * group:4} completions of {tokens:2} tokens: {count / fast:8.0f} tokens/s, "
            f"generate {count / slow:8.0f}: {ratio:.2f}x",
            flush=True,
        )
    verdict = "met" if worst >= BAR else "missed"
    print(f"greedy outputs equal: {equal}; default rollout {worst:.2f}x, bar {BAR}x: {verdict}")
    return int(not equal or worst < BAR)


if __name__ == "__main__":
    sys.exit(main())
