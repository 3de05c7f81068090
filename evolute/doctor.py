"""What this installation has: versions, extras, devices, threads, Weights & Biases, SLURM."""

import importlib.util
import os
import shutil

from rich.console import Console
from rich.table import Table

from evolute.run_folder import environment_facts, wandb_logged_in

EXTRAS = {
    "llm": ("transformers", "datasets", "safetensors", "peft"),
    "wandb": ("wandb", "PIL"),
    "tensorboard": ("tensorboard",),
    "splatting": ("numba", "gsplat", "plyfile", "trimesh", "embreex", "PIL"),
}


def doctor() -> int:
    """Print what was found; return 0."""
    facts = environment_facts()
    table = Table("what", "found", title="evolute doctor", show_header=False)
    table.add_row("python", f"{facts['python']} on {facts['platform']}")
    for package, version in facts["versions"].items():
        table.add_row(package, version)
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        table.add_row(
            f"extra {extra}",
            "complete" if not missing else f"lacks {', '.join(missing)}: pip install 'evolute[{extra}]'",
        )
    table.add_row("devices", ", ".join(facts["cuda"]) or "CPU only")
    table.add_row("threads", f"{facts['threads']} of {facts['cpu_count']} processors")
    table.add_row("Weights & Biases", _wandb())
    slurm = shutil.which("sbatch")
    job = os.environ.get("SLURM_JOB_ID")
    table.add_row("SLURM", (f"sbatch at {slurm}" if slurm else "not found") + (f", inside job {job}" if job else ""))
    Console().print(table)
    return 0


def _wandb() -> str:
    if importlib.util.find_spec("wandb") is None:
        return "not installed"
    return "logged in" if wandb_logged_in() else "not logged in: runs are kept offline in the run folder"
