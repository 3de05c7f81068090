"""The command line. What needs no torch answers before torch is imported."""

import os
import sys
from collections.abc import Callable, Sequence

from evolute.messages import fail
from evolute.registry import check_yaml, nearest, recipes, resolve, strategies, summary
from evolute.signals import listen

USAGE = """usage: evolute COMMAND ...

  fit --config RECIPE       train; RECIPE is a packaged name (llm/pretrain) or a YAML file
  validate, test, predict   the same, for a trained run: add --ckpt_path FILE
  launch --config RECIPE    submit fit to SLURM, checked first; --dry-run prints the command
  recipes                   list the packaged recipes, and the strategies to add: --config RECIPE --config strategy/ddp
  report RUN ...            write the HTML report of one run, or of several side by side
  export CHECKPOINT FOLDER  write a language model as a Hugging Face folder
  data ml-100k              get MovieLens-100K, which the recommender recipes use
  item-vectors FILE         encode item texts and project them along what users take together; --help lists the options
  doctor                    versions, extras, devices, threads, as found on this machine

  --any.key value overrides a value of the configuration; 'evolute fit --help' lists the keys
  --run DIR      run folder (default: runs/<recipe>-<number>), --resume continues it, --resume auto also begins it
  --wandb true   also log to Weights & Biases (offline unless logged in); --tensorboard true likewise
  EVOLUTE_DEBUG=1 in the environment shows the traceback behind an error of one line
"""

TRAINING = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 2 for bad input with one line on stderr, or 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        from evolute import __version__

        print(f"evolute {__version__}")
        return 0
    command, rest = args[0], args[1:]
    commands: dict[str, Callable[[list[str]], int]] = {
        **{name: _train(name) for name in TRAINING},
        "launch": _launch,
        "recipes": _recipes,
        "report": _report,
        "export": _export,
        "data": _data,
        "item-vectors": _item_vectors,
        "doctor": _doctor,
    }
    if command not in commands:
        return fail(f"no command {command!r}{nearest(command, list(commands))}; 'evolute --help' lists the commands")
    try:
        return commands[command](rest)
    except KeyboardInterrupt:
        return 130


def hush() -> None:
    """Silence what libraries say on stderr that says nothing about the run; they ask when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _train(command: str) -> Callable[[list[str]], int]:
    def run(args: list[str]) -> int:
        try:
            args, names = _resolved(args)
        except ValueError as error:
            return fail(str(error))
        wants_help = any(a in ("-h", "--help") or a.startswith("--help=") for a in args)
        if not names and not wants_help:
            return fail(f"{command} needs --config RECIPE; 'evolute recipes' lists the packaged ones")
        if command == "fit":
            listen()
        watched = sys.stderr.isatty()
        hush()
        if watched:  # a notice for who waits, wiped out again: errors stand alone
            print("loading torch and lightning ...", end="\r", file=sys.stderr, flush=True)
        try:
            from evolute.cli import train
        finally:
            if watched:
                print(" " * 40, end="\r", file=sys.stderr, flush=True)
        return train(command, args, names)

    return run


def _resolved(args: list[str]) -> tuple[list[str], list[str]]:
    """Turn the configurations' names into paths; return the arguments and the names as given."""
    out: list[str] = []
    names: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word in ("--config", "-c"):
            if not rest or rest[0].startswith("-"):
                raise ValueError("--config needs the name of a recipe or a YAML file")
            names.append(rest.pop(0))
            path = resolve(names[-1])
            check_yaml(path)
            out += ["--config", str(path)]
        elif word.startswith("--config="):
            rest = ["--config", word.removeprefix("--config="), *rest]
        elif word == "--resume" and (not rest or rest[0].startswith("-")):
            out += ["--resume", "true"]  # a bare flag is what people type; the parser wants a value
        else:
            out.append(word)
    return out, names


def _launch(args: list[str]) -> int:
    from evolute.launch import launch

    return launch(args)


def _recipes(args: list[str]) -> int:
    if args:
        return fail(f"recipes takes no arguments, got {args[0]!r}")
    for name, path in recipes().items():
        print(f"{name:24} {summary(path)}")
    print("\nAdded to a recipe with a second --config:")
    for name, path in strategies().items():
        print(f"{name:24} {summary(path)}")
    return 0


def _report(args: list[str]) -> int:
    from evolute.reports.cli import report_command

    try:
        report_command(args)
    except (OSError, ValueError) as error:
        return fail(str(error))
    return 0


def _export(args: list[str]) -> int:
    if len(args) != 2 or args[0].startswith("-"):
        return fail("export takes two arguments: CHECKPOINT FOLDER")
    from evolute.recipes.llm import export

    try:
        export(args[0], args[1])
    except (OSError, ValueError, RuntimeError) as error:
        return fail(str(error))
    print(f"wrote {args[1]}")
    return 0


def _data(args: list[str]) -> int:
    from evolute.item_commands import data_command

    return data_command(args)


def _item_vectors(args: list[str]) -> int:
    hush()
    from evolute.item_commands import item_vectors_command

    return item_vectors_command(args)


def _doctor(args: list[str]) -> int:
    if args:
        return fail(f"doctor takes no arguments, got {args[0]!r}")
    from evolute.doctor import doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
