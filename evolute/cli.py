"""Training commands: LightningCLI, with a run folder, exact resume, and errors of one line."""

import importlib
import logging
import os
import secrets
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from evolute.__main__ import fail
from evolute.callbacks import MetricsCSV, RunCheckpoint, RunReport
from evolute.callbacks.run_checkpoint import checkpoints
from evolute.messages import condense
from evolute.run_folder import RunFolder, next_free


class BadInput(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Parser(LightningArgumentParser):
    """The Lightning parser, whose errors are one line with the nearest valid name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated flag would be taken for the one it begins: --trainer.max_step for --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`BadInput` instead of printing the usage."""
        known = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        raise BadInput(condense(message, known))


class RecipeCLI(LightningCLI):
    """LightningCLI for recipes: the model and the data are classes named in the YAML.

    Args:
        names: configurations as the user named them, for the run folder's name.
        args: command-line arguments, the command first.
    """

    def __init__(self, names: list[str], args: list[str]) -> None:
        self.names = names
        self.started = False
        super().__init__(
            seed_everything_default=0,
            save_config_callback=None,
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of a run that no class of Lightning has."""
        parser.add_argument(
            "--run", type=str | None, default=None, help="Run folder; a new one under runs/ by default."
        )
        parser.add_argument(
            "--resume", type=bool, default=False, help="Continue the run in --run from its newest checkpoint."
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=100, help="Optimizer steps between two checkpoints."
        )
        parser.add_argument(
            "--wandb", type=bool, default=False, help="Log to Weights & Biases too (offline unless logged in)."
        )
        parser.add_argument("--tensorboard", type=bool, default=False, help="Log to TensorBoard too.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments given; the process's own are the same, seen before names of recipes became paths."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the model's arguments as the configuration has them; a checkpoint's copy does not override them."""

    def before_instantiate_classes(self) -> None:
        """Settle the run folder and the checkpoint before anything is built."""
        config = self.config[str(self.subcommand)]
        if not isinstance(config.model.get("class_path"), str):
            raise BadInput("the configuration names no model: give it a 'model' section with class_path")
        recipe = Path(self.names[0]).stem if self.names else "run"
        self.folder = Path(config.run) if config.run else next_free(Path("runs"), recipe)
        self.ckpt: Path | None = Path(config.ckpt_path) if config.get("ckpt_path") else None
        if self.subcommand == "fit":
            existing = checkpoints(self.folder / "checkpoints")
            if config.resume and config.run is None:
                raise BadInput("--resume needs --run DIR, the run to continue")
            if not config.resume and (self.folder / "config.yaml").exists():
                raise BadInput(
                    f"{self.folder} holds a run already: add --resume to continue it, or choose another --run"
                )
            if config.resume and existing and self.ckpt is None:
                self.ckpt = existing[-1]
        if self.ckpt is not None:
            check_checkpoint(self.ckpt, config.model.class_path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run's loggers and callbacks around those of the configuration."""
        config: dict[str, Any] = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        chosen: list[Callback] = config.get("callbacks") or []
        config.update(default_root_dir=str(self.folder), logger=self._loggers(), enable_checkpointing=False)
        config["max_epochs"] = -1 if config.get("max_epochs") is None else config["max_epochs"]
        if self.subcommand == "fit":
            first = RunCheckpoint(every_n_steps=self._get(self.config_init, "checkpoint_every"))
            resolved = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False, format="yaml")
            folder = RunFolder(yaml.safe_load(resolved), self._note_start)
            report = [] if any(isinstance(c, RunReport) for c in chosen) else [RunReport()]
            bar = [] if any(isinstance(c, ProgressBar) for c in chosen) else [TQDMProgressBar()]
            config["callbacks"] = [first, folder, *chosen, *report, *bar]
        return self.trainer_class(**config)

    def _loggers(self) -> list[Logger]:
        if self.subcommand != "fit":
            return []
        loggers: list[Logger] = [MetricsCSV(self.folder)]
        if self._get(self.config_init, "wandb"):
            loggers.append(_wandb(self.folder))
        if self._get(self.config_init, "tensorboard"):
            loggers.append(_tensorboard(self.folder))
        return loggers

    def _note_start(self) -> None:
        self.started = True

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = str(self.ckpt) if self.ckpt is not None else None
        kwargs["weights_only"] = True if self.ckpt is not None else None
        return kwargs


def check_checkpoint(path: Path, model: str) -> None:
    """Refuse a checkpoint that is missing, truncated, or of another recipe, before anything is built.

    Raises:
        BadInput: saying which of these it is.
    """
    if not path.exists():
        raise BadInput(f"no checkpoint at {path}")
    if path.is_dir():  # sharded checkpoints are read by their strategy
        return
    try:
        content = torch.load(path, weights_only=True, map_location="meta", mmap=True)
    except Exception as error:
        raise BadInput(
            f"{path} is no readable checkpoint, it may be truncated: {str(error).splitlines()[0][:160]}"
        ) from error
    owner = content.get("evolute", {}).get("module") if isinstance(content, dict) else None
    if owner is None:
        raise BadInput(f"{path} was not written by an evolute run")
    if owner != model and owner != _real_path(model):
        raise BadInput(f"{path} is a checkpoint of {owner}, not of {model}")


def _real_path(class_path: str) -> str:
    """Return where a class is defined, for one that the configuration names through a package."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return f"{cls.__module__}.{cls.__qualname__}"


def _wandb(folder: Path) -> Logger:
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
    except ImportError as error:
        raise BadInput("--wandb needs the extra: pip install 'evolute[wandb]'") from error
    id_file = folder / "wandb" / "run_id"
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    online = bool(wandb.api.api_key)
    return WandbLogger(
        name=folder.name, save_dir=folder, id=run_id, resume="allow", offline=not online, project="evolute"
    )


def _tensorboard(folder: Path) -> Logger:
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ImportError as error:
        raise BadInput("--tensorboard needs the extra: pip install 'evolute[tensorboard]'") from error


def train(command: str, args: list[str], names: list[str]) -> int:
    """Run a training command; return 0, or 2 with one line on stderr for bad input.

    Errors before the first step are the user's to mend and get one line. Later ones are ours and keep their traceback.
    """
    quiet()
    cli = RecipeCLI.__new__(RecipeCLI)
    try:
        cli.__init__(names, [command, *args])
    except BadInput as error:
        return fail(str(error))
    except (MisconfigurationException, ValueError, OSError, ImportError, RuntimeError, TypeError, KeyError) as error:
        if getattr(cli, "started", False):
            raise
        return fail(condense(str(error)) or type(error).__name__)
    return 0


def quiet() -> None:
    """Silence notices that say nothing about the run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_uninformative)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")


def _uninformative(entry: Any) -> bool:
    text = entry.getMessage()
    return not any(
        part in text for part in ("litlogger", "GPU available", "TPU available", "HPU available", "Seed set to")
    )
