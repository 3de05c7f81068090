"""What is said on stderr: errors of the configuration in one line, and nothing else before a run starts."""

import functools
import importlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from evolute.registry import nearest


def fail(message: str) -> int:
    """Print one line of error and return exit code 2."""
    print(f"evolute: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


_UNKNOWN = re.compile(r"(?:[Oo]ption '|does not accept option '|unrecognized arguments?: --)([\w.]+)")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")


def condense(message: str, known: Iterable[str] = ()) -> str:
    """Condense what jsonargparse says, often a tree of attempts on each type of a union, to its most specific line.

    Args:
        message: the parser's message.
        known: keys that the parser accepts.
    """
    where = re.match(r'Parser key "([\w.]+)"', message)
    # A union lists the attempt on every member; the first is the class itself, the others say that it is not None.
    attempts = re.split(r"\n\s*Errors:\s*\n", message, maxsplit=1)
    text = attempts[-1]
    if len(attempts) == 2:
        first = re.match(r"(\s*)- ", text)
        if first:
            each = [attempt.lstrip(" -") for attempt in re.split(rf"\n{first[1]}- ", text)]
            # Keys under a name that could also be a plain string: that it is no string says nothing.
            keys = re.search(r"Given value type: <class '\S*(dict|Namespace|NestedArg)'>", each[-1])
            text = next((a for a in each if not (keys and a.startswith("Expected a <class 'str'>"))), each[0])
            text = re.split(r"\n\s*Given value", text)[0]
    text = " ".join(text.split())
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text).replace("Expected a one of", "expected one of")
    text = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text)
    text = text.replace("Expected a ", "expected ").replace(". Got value:", ", got")
    text = re.sub(r"the following arguments are required: (?:\w+\.)?(\w+)", r"the configuration lacks '\1'", text)
    if "did you mean" not in text:
        text += _suggestion(text, list(known))
    return f"{where[1]}: {text}" if where and not text.startswith(where[1]) else text


def _suggestion(text: str, known: list[str]) -> str:
    if unknown := _UNKNOWN.search(text):
        key = unknown[1]
        head, _, rest = key.partition(".")
        heads = sorted({name.split(".")[0] for name in known})
        if head not in heads and rest:
            return nearest(head, heads)
        return nearest(key, known)
    if wrong := _CLASS.search(text):
        module, _, name = wrong[1].rpartition(".")
        return nearest(name, _names_in(module))
    return ""


def _names_in(module: str) -> list[str]:
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return []
    return list(getattr(found, "__all__", dir(found)))


class Held:
    """Warnings and log entries of a run that has not started: shown when it does, dropped if it is refused.

    What says nothing about the run is dropped in either case.

    Args:
        quiet: show errors only, later too: another process says the rest.

    Attributes:
        released: whether the run started.
    """

    NOISE = re.compile(
        "litlogger|GPU available|TPU available|HPU available|Seed set to|Detected KeyboardInterrupt|Restor|"
        "Loaded model|does not have many workers|LeafSpec.*is deprecated|dataloader is not resumable|"
        "initializing deepspeed distributed|saving the DeepSpeed Stage 3 checkpoint|torch.distributed.* is deprecated|"
        "`srun` command is available"
    )

    def __init__(self, quiet: bool = False) -> None:
        self.released = False
        self._quiet = quiet
        self._entries: list[Callable[[], Any]] = []
        self._show = warnings.showwarning
        warnings.showwarning = self._hold_warning
        known = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
        self._filters = {handler: self._filter(handler) for logger in known for handler in logger.handlers}
        for handler, entry_filter in self._filters.items():
            handler.addFilter(entry_filter)

    def release(self) -> None:
        """Show what was held back, and all that follows as it comes."""
        self.released = True
        entries, self._entries = self._entries, []
        for show in entries:
            show()

    def close(self) -> None:
        """Let warnings and log entries go their own way again."""
        warnings.showwarning = self._show
        for handler, entry_filter in self._filters.items():
            handler.removeFilter(entry_filter)

    def _hold_warning(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if not self._quiet and not self.NOISE.search(str(message)):
            show = functools.partial(self._show, message, *args, **kwargs)
            show() if self.released else self._entries.append(show)

    def _filter(self, handler: logging.Handler) -> Callable[[logging.LogRecord], bool]:
        def passes(entry: logging.LogRecord) -> bool:
            if (self._quiet and entry.levelno < logging.ERROR) or self.NOISE.search(entry.getMessage()):
                return False
            if not self.released:
                self._entries.append(lambda: handler.handle(entry))
            return self.released

        return passes
