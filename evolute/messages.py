"""Errors of the configuration in one line: what is wrong, where, and the nearest valid name."""

import importlib
import re
from collections.abc import Iterable
from typing import Any

from evolute.registry import nearest

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
            text = re.split(rf"\n{first[1]}- |\n\s*Given value", text)[0].lstrip(" -")
    text = " ".join(text.split())
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text).replace("Expected a one of", "expected one of")
    text = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text).replace("Expected a ", "expected ").replace(". Got value:", ", got")
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
