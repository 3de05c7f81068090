"""The packaged configurations, by name. Imports nothing heavy.

``recipes/<task>/configs/<name>.yaml`` is the recipe ``<task>/<name>``; ``recipes/configs/strategy/<name>.yaml`` is what
``strategy/<name>`` adds to one.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


def recipes() -> dict[str, Path]:
    """Return the packaged recipes, name to file."""
    return {f"{p.parent.parent.name}/{p.stem}": p for p in sorted(RECIPES.glob("*/configs/*.yaml"))}


def strategies() -> dict[str, Path]:
    """Return what can be added to any recipe with a second ``--config``, name to file."""
    return {f"strategy/{p.stem}": p for p in sorted(RECIPES.glob("configs/strategy/*.yaml"))}


def summary(path: Path) -> str:
    """Return the first comment line of a configuration: what it is."""
    for line in path.read_text().splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ")
    return ""


def resolve(name: str) -> Path:
    """Return the file of a configuration: a local path if there is one, else a packaged one.

    Raises:
        ValueError: if neither exists, with the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipes() | strategies()
    if name in known:
        return known[name]
    raise ValueError(f"no recipe or file named {name!r}{nearest(name, known)}; 'evolute recipes' lists the recipes")


def check_yaml(path: Path) -> None:
    """Check that a file holds a YAML mapping.

    Raises:
        ValueError: saying where it does not.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{path}: holds {found}, not keys with values")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``, did you mean ...?`` for a misspelt word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
