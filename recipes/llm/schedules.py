"""Learning-rate schedules as a factor of the peak rate."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["cosine", "wsd", "constant"]
DECAY = 0.2
"""Share of a run that ``"wsd"`` spends going down."""


def lr_factor(schedule: Schedule, warmup: float, total: float) -> Callable[[int], float]:
    """Return the factor at optimizer step ``i`` (from 0).

    All rise linearly over the warm-up, whose first step already moves. ``"cosine"`` then falls to 0 along half a
    cosine; ``"wsd"`` (warm-up, stable, decay; Hu et al. 2024, MiniCPM, section 4) stays at 1 and falls linearly to 0
    over the last fifth; ``"constant"`` stays at 1.

    Args:
        schedule: its name.
        warmup: number of steps if at least 1, else share of ``total``.
        total: optimizer steps of the run; ``inf`` if unknown.

    Raises:
        ValueError: if the schedule needs ``total`` and it is infinite.
    """
    if math.isinf(total) and (schedule != "constant" or 0 < warmup < 1):
        raise ValueError(
            f"schedule={schedule!r} with warmup={warmup} needs a length: set trainer.max_steps or trainer.max_epochs, "
            "or use schedule='constant' with warmup in steps"
        )
    rise = int(warmup if warmup >= 1 else warmup * total) if warmup else 0

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        if schedule == "constant":
            return 1.0
        if schedule == "wsd":
            return min(1.0, max(0.0, (total - step) / max(1.0, DECAY * total)))
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, total - rise))))

    return factor
