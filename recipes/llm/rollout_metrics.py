"""What a rollout came to, under the names that TRL's users know."""

from torch import Tensor

from evolute.recipes.llm.rewards import Rewards, Scores
from evolute.recipes.llm.rollouts import Rollout


def rollout_metrics(
    rollout: Rollout, scores: Scores, functions: Rewards, rewards: Tensor, equal: Tensor, advantages: Tensor
) -> dict[str, float]:
    """Return the metrics of a rollout.

    Args:
        rollout: the completions.
        scores: what the reward functions gave.
        functions: the functions.
        rewards: weighted sums [prompts, completions of each]; NaN where there is none.
        equal: groups whose rewards are all equal [prompts].
        advantages: of the completions [prompts, completions of each].
    """
    known = rewards[rewards.isfinite()]
    spreads = [row[row.isfinite()].std(correction=0) for row in rewards if row.isfinite().any()]
    lengths = rollout.mask.sum(1).double()
    ended = lengths[rollout.finished]
    found: dict[str, float] = {
        "reward": _mean(known),
        "reward_std": float(sum(spreads) / len(spreads)) if spreads else float("nan"),
        "frac_reward_zero_std": float(equal.double().mean()),
        "reward_missing": float((~rewards.isfinite()).double().mean()),
        "advantage_max": float(advantages.abs().max()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((~rollout.finished).double().mean()),
        "completions/mean_terminated_length": _mean(ended),
    }
    for name, row in zip(functions.names, scores.each, strict=True):
        row = row[row.isfinite()]
        found[f"rewards/{name}/mean"] = _mean(row)
        found[f"rewards/{name}/std"] = float(row.std()) if len(row) > 1 else 0.0
        found[f"rewards/{name}/failures"] = float(functions.failures[name])
    return found


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
