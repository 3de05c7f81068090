"""Rollouts drawn by vLLM on GPUs, behind the interface of :mod:`evolute.recipes.llm.rollouts`."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evolute.recipes.llm.finetune import effective_weight
from evolute.recipes.llm.rollouts import Rollout


class VLLMEngine:
    """Draws completions with a vLLM engine in this process, which is given the trained model's weights every time.

    Name it as ``rollout_engine: evolute.recipes.llm.vllm_engine.VLLMEngine``. The engine is built at the first
    rollout, from the model's configuration; adapters are merged into what it gets. Its draws are decided by a seed a
    prompt, made of the uniforms it is given, so they repeat on the same machine; they are not those of the default.
    One process, or ranks that each hold the whole model and a GPU.

    Args:
        **options: arguments of ``vllm.LLM`` over those set here (``gpu_memory_utilization`` 0.4 among them).

    Raises:
        ImportError: if vllm is missing.
    """

    def __init__(self, **options: Any) -> None:
        # Weights are handed over as they are: the engine must live in this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("VLLMEngine needs vllm: pip install 'evolute[vllm]'") from error
        self._vllm: Any = vllm
        self.options = options
        self._engine: Any = None

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        max_tokens: int,
        temperature: float,
        uniforms: Tensor | None,
        eos_id: int,
    ) -> Rollout:
        """Draw completions; see :class:`evolute.recipes.llm.rollouts.RolloutEngine`."""
        engine = self._ready(model)
        engine.apply_model(lambda served: served.load_weights(weights_of(model)))
        engine.reset_prefix_cache()  # what was computed with the weights of before
        seeds = [None] * len(prompts) if uniforms is None else _seeds(uniforms, group_size)
        settings = [
            self._vllm.SamplingParams(
                n=group_size, max_tokens=max_tokens, temperature=0.0 if uniforms is None else temperature, seed=seed,
                logprobs=0, stop_token_ids=[eos_id], detokenize=False,
            )
            for seed in seeds
        ]  # fmt: skip
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = engine.generate(asked, settings, use_tqdm=False)
        return _rollout([drawn for answer in answers for drawn in answer.outputs], max_tokens, eos_id)

    def _ready(self, model: Any) -> Any:
        if self._engine is None:
            with tempfile.TemporaryDirectory() as folder:
                model.config.save_pretrained(folder)
                options = {
                    "load_format": "dummy", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.4,
                    "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                    "logprobs_mode": "processed_logprobs", "enforce_eager": True, "seed": 0,
                }  # fmt: skip
                self._engine = self._vllm.LLM(model=folder, **{**options, **self.options})
        return self._engine


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own parameters by their Hugging Face names, adapters merged into them."""
    for name, value in model.named_parameters():
        if ".lora_" in name:
            continue
        if ".base_layer.weight" in name:
            layer = model.get_submodule(name.partition(".base_layer.")[0])
            value = effective_weight(layer)[0]
        yield name.replace(".base_layer.", "."), value.detach()


def _seeds(uniforms: Tensor, group_size: int) -> list[int]:
    return [int(u * 2**31) for u in uniforms[::group_size, 0].double().tolist()]


def _rollout(outputs: Sequence[Any], width: int, eos_id: int) -> Rollout:
    """Return vLLM's completions as tensors; the end token, where it was drawn, is their last."""
    ids, log_probs = torch.zeros((len(outputs), width), dtype=torch.long), torch.zeros((len(outputs), width))
    lengths = torch.tensor([len(o.token_ids) for o in outputs])
    for row, output in enumerate(outputs):
        tokens = list(output.token_ids)
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        found = [places[token].logprob for token, places in zip(tokens, output.logprobs, strict=True)]
        log_probs[row, : len(tokens)] = torch.tensor(found)
    mask = torch.arange(width) < lengths.unsqueeze(1)
    return Rollout(ids, mask, log_probs, ((ids == eos_id) & mask).any(1))
