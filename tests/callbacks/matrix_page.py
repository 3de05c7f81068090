"""The page that ``make matrix`` writes: what works where, and what is meant by that."""

from tests.callbacks.matrix import FACTORS, LIMITS, STEPS, all_cells, refusal_of
from tests.settings import MATRIX

PAGE = """# Compatibility

Written by `make matrix`, which runs all {cells} cells of this table and compares them. `make test` runs a part
of them, in which every two of the values below meet.

{callbacks} callbacks and settings of them, under {strategies}, in {precisions}, with {accumulations} micro-batches
a step, run through and stopped half-way and resumed.

| callback | {head} |
| --- | {rule} |
{rows}

*works*: a run of {steps} steps on two processes ends where one uninterrupted process ends on the same global
batches. Both ranks hold the same weights, bit for bit. Relative to the way that a parameter has gone since the
start, they are within {fp32[0]:g} of that process's in fp32 and within {bf16[0]:g} in bf16. Every metric that the
callback records, at every step, is within {fp32[1]:g} of that process's in fp32 and within {bf16[1]:g} in bf16,
relative to the largest value of its kind over layers and steps. Not compared are clock times, what an
iteration leaves when it stops (`curvature/residual`) and, in bf16, what counts or cuts off at a threshold
({jumps}). A resumed run ends bit for bit where the uninterrupted one under the
same strategy does, and has recorded the same.

*refuses*, or works with the exception numbered: before the first step, with a message that says what to change.
{notes}

*ZeRO* is DeepSpeed's, on CPU processes over gloo, through `evolute.strategies.ZeROStrategy`; in stage 3 every
parameter is sharded (persistence threshold 0). The module has tied and frozen parameters and two parameter
groups; it is trained by AdamW with gradient clipping, and the last step of each epoch is smaller than the others.

*bf16* is `bf16-mixed`: autocast over float32 weights in one process and under DDP. DeepSpeed has a kind of its
own: module and inputs are bfloat16, and the optimizer steps float32 masters of the weights, which start rounded.
Both are compared with the one process, from weights that bfloat16 can hold.

The arguments in brackets make a callback measure the same whatever the number of processes: by default each
takes its samples from its own part of the batch, and LayerMonitor takes noise from the ranks if there are several.
"""


def page() -> str:
    """Return ``docs/compatibility.md``."""
    notes: list[str] = []
    rows = [f"| {_described(name)} | {' | '.join(_entries(name, notes))} |" for name in FACTORS["name"]]
    return PAGE.format(
        cells=len(all_cells()),
        callbacks=len(FACTORS["name"]),
        strategies=", ".join(FACTORS["strategy"]),
        precisions=" and ".join(FACTORS["precision"]),
        accumulations=" and ".join(map(str, FACTORS["accumulate"])),
        head=" | ".join(FACTORS["strategy"]),
        rule=" | ".join("---" for _ in FACTORS["strategy"]),
        rows="\n".join(rows),
        notes="".join(f"\n{i}. {note}" for i, note in enumerate(notes, 1)),
        steps=STEPS,
        jumps=", ".join(f"`{metric}`" for metric in sorted({m for s in MATRIX.values() for m in s.jumps})),
        **LIMITS,
    )


def _described(name: str) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in MATRIX[name].everywhere.items())
    return f"{name} ({arguments})" if arguments else name


def _entries(name: str, notes: list[str]) -> list[str]:
    """Return one entry a strategy; what is refused becomes a note, and the entry its number."""
    entries: list[str] = []
    for strategy in FACTORS["strategy"]:
        stated = [refusal_of(c) for c in all_cells() if (c.name, c.strategy) == (name, strategy)]
        numbers: list[int] = []
        for refusal in (r for r in stated if r is not None):
            where = ", ".join(f"{factor} {' or '.join(map(str, refusal.values(factor)))}" for factor in refusal.where)
            note = f"With {where}; the message names `{refusal.message}`."
            notes += [note] if note not in notes else []
            numbers += [number] if (number := notes.index(note) + 1) not in numbers else []
        verb = "works" if None in stated else "refuses"
        entries.append(verb + "".join(f" [{number}]" for number in numbers))
    return entries
