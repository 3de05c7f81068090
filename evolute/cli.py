"""Training commands: LightningCLI, with a run folder, exact resume, and errors of one line."""

import importlib
import os
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from evolute.callbacks import MetricsCSV, RunCheckpoint, RunReport
from evolute.callbacks.run_checkpoint import checkpoints
from evolute.callbacks.zero_checkpoint import load_checkpoint
from evolute.checkpoint_io import AnyCheckpointIO
from evolute.folders import next_free
from evolute.messages import Held, condense
from evolute.ranks import follows, join, refuse
from evolute.requeue import Interrupted, StopWhenTold, interruptible
from evolute.run_folder import MakeLogger, RunFolder, tensorboard_logger, wandb_logger
from evolute.signals import INTERRUPTED, listen, told
from evolute.strategies import choose_accelerator


class BadInput(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Parser(LightningArgumentParser):
    """The Lightning parser, whose errors are one line with the nearest valid name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated flag would be taken for the one it begins: --trainer.max_step for --trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`BadInput` instead of printing the usage."""
        parser = getattr(ex, "subcommand_parser", self)
        known = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
        raise BadInput(condense(message, known)) from ex


class RecipeCLI(LightningCLI):
    """LightningCLI for recipes: the model and the data are classes named in the YAML.

    Args:
        names: configurations as the user named them, for the run folder's name.
        args: command-line arguments, the command first.
        held: released once the run starts.
    """

    def __init__(self, names: list[str], args: list[str], held: Held) -> None:
        self.names = names
        self.held = held
        self.command = args[0]
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

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the one that was called: to build the parsers of the others takes most of a second."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of a run that no class of Lightning has."""
        parser.add_argument(
            "--run", type=str | None, default=None, help="Run folder; a new one under runs/ by default."
        )
        parser.add_argument(
            "--resume",
            type=bool | Literal["auto"],
            default=False,
            help="Continue the run in --run from its newest checkpoint; auto begins it if there is none.",
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
        if config.trainer.get("default_root_dir") is not None:
            raise BadInput(f"trainer.default_root_dir={config.trainer.default_root_dir!r}: name the folder with --run")
        recipe = next((Path(name).stem for name in self.names if not name.startswith("strategy/")), "run")
        self.folder = Path(config.run) if config.run else next_free(Path("runs"), recipe)
        self.ckpt: Path | None = Path(config.ckpt_path) if config.get("ckpt_path") else None
        if self.subcommand == "fit":
            self._settle(config)
        if self.ckpt is not None:
            check_checkpoint(self.ckpt, config.model.class_path)

    def _settle(self, config: Any) -> None:
        """Decide whether a fit begins or continues a run, and how long it lasts."""
        if self.folder.exists() and not self.folder.is_dir():
            raise BadInput(f"--run {self.folder} is not a folder")
        begun = (self.folder / "config.yaml").exists()
        if config.resume and config.run is None:
            raise BadInput("--resume needs --run DIR, the run to continue")
        if config.resume == "auto":
            config.resume = begun
        if config.resume and not begun:
            raise BadInput(f"--resume: {self.folder} holds no run; leave --resume out to begin one there")
        if begun and not config.resume:
            raise BadInput(f"{self.folder} holds a run already: add --resume to continue it, or choose another --run")
        existing = checkpoints(self.folder / "checkpoints")
        if config.resume and existing and self.ckpt is None:
            self.ckpt = existing[-1]
        trainer = config.trainer
        if trainer.max_epochs is None:  # Lightning would train a thousand epochs
            trainer.max_epochs = 1 if trainer.max_steps == -1 and trainer.max_time is None else -1

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run's loggers and callbacks around those of the configuration."""
        config: dict[str, Any] = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        chosen: list[Callback] = config.get("callbacks") or []
        config.update(default_root_dir=str(self.folder), enable_checkpointing=False)
        config.update(plugins=any_checkpoint(own_requeue(config.get("plugins"))))
        if self.subcommand != "fit":
            start = {f"on_{stage}_start": lambda *_: self.held.release() for stage in ("validation", "test", "predict")}
            config.update(callbacks=[LambdaCallback(**start), *chosen], logger=False)
            return self.trainer_class(**config)
        resolved = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False, format="yaml")
        folder = RunFolder(
            yaml.safe_load(resolved),
            numbered=not self._get(self.config, "run"),
            resumed=self._get(self.config, "resume"),
            loggers=self._late_loggers(),
            on_start=self.held.release,
        )
        first = RunCheckpoint(every_n_steps=self._get(self.config_init, "checkpoint_every"))
        report = [] if any(isinstance(c, RunReport) for c in chosen) else [RunReport()]
        own_bar = config.get("enable_progress_bar") is False or any(isinstance(c, ProgressBar) for c in chosen)
        bar = [] if own_bar else [TQDMProgressBar()]
        stop = [StopWhenTold(first, told)] if listen() else []
        config["callbacks"] = [first, *stop, folder, *chosen, *report, *bar]
        given = config.get("logger")
        given = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
        config["logger"] = [MetricsCSV(self.folder), *given]
        return self.trainer_class(**config)

    def _late_loggers(self) -> list[MakeLogger]:
        """Return makers of the loggers that write as soon as they exist, after checking that they can be made."""
        makers: list[MakeLogger] = []
        for key, package, maker in (
            ("wandb", "wandb", wandb_logger),
            ("tensorboard", "torch.utils.tensorboard", tensorboard_logger),
        ):
            if self._get(self.config_init, key):
                try:
                    importlib.import_module(package)
                except ImportError as error:
                    raise BadInput(f"--{key} needs the extra: pip install 'evolute[{key}]'") from error
                makers.append(maker)
        return makers

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = str(self.ckpt) if self.ckpt is not None else None
        kwargs["weights_only"] = True if self.ckpt is not None else None
        return kwargs


def own_requeue(plugins: Any) -> Any:
    """Add to a trainer's plugins, within a SLURM job, that Lightning leaves requeueing to us: it saves inexactly."""
    given: list[Any] = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
    if not SLURMEnvironment.detect() or any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        return plugins
    return [*given, SLURMEnvironment(auto_requeue=False)]


def any_checkpoint(plugins: Any) -> Any:
    """Add to a trainer's plugins, unless the configuration has its own, what opens checkpoints of other strategies."""
    given: list[Any] = plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]
    return plugins if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AnyCheckpointIO()]


def check_checkpoint(path: Path, model: str) -> None:
    """Refuse a checkpoint that is missing, truncated, or of another recipe, before anything is built.

    Raises:
        BadInput: saying which of these it is.
    """
    if not path.exists():
        raise BadInput(f"no checkpoint at {path}")
    try:
        content = load_checkpoint(path, "meta")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(str(error)) from error
    owner = content.get("evolute", {}).get("module")
    if owner is None:
        raise BadInput(f"{path} was not written by an evolute run")
    if owner != model and owner != _real_path(model):
        raise BadInput(f"{path} is a checkpoint of {owner}, not of {model}")


def _real_path(class_path: str) -> str:
    """Return where a class is defined, for one that the configuration names through a package."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return f"{cls.__module__}.{cls.__qualname__}"


def train(command: str, args: list[str], names: list[str]) -> int:
    """Run a training command; return 0, 130 after Ctrl-C, 75 when told to stop, 2 with one line on stderr if refused.

    Errors before the first batch are the user's to mend and get one line, with nothing beside it: warnings and log
    entries wait until the run starts. Later errors keep their traceback; EVOLUTE_DEBUG=1 keeps it always.
    """
    join()
    choose_accelerator()
    held = Held(quiet=follows())
    try:
        with interruptible(told):
            cli = RecipeCLI(names, [command, *args], held)
    except BadInput as error:
        return refuse(str(error))
    except Interrupted as interrupted:
        # One rank speaks for all: srun ends the other tasks as soon as one leaves with a code that is not 0, and the
        # first rank may still be writing its report.
        if os.environ.get("SLURM_PROCID", "0") != "0":
            return 0
        print(f"{interrupted}: the same command with --resume continues it", flush=True)
        return INTERRUPTED
    except (MisconfigurationException, ValueError, OSError, ImportError, RuntimeError, TypeError, KeyError) as error:
        if held.released or os.environ.get("EVOLUTE_DEBUG"):
            raise
        plain = isinstance(error, MisconfigurationException | ValueError | OSError | ImportError | RuntimeError)
        return refuse(condense(str(error) if plain else f"{type(error).__name__}: {error}") or type(error).__name__)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning ends so after Ctrl-C
            return 130
        raise
    finally:
        held.close()
    if command == "fit" and not held.released and not follows():
        step = cli.trainer.global_step
        print(f"{cli.folder} is finished, at step {step}: a larger trainer.max_steps or max_epochs would continue it")
    return 0
