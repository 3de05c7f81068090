"""Where documents come from: the standard library, files and folders, Hugging Face data sets."""

import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evolute.data.tokenizers import one_line

# Modules and packages that CPython 3.11, 3.12 and 3.13 all have. Left out: tests, and what is tables rather than
# prose or code (encodings, pydoc_data), and what Linux distributions package apart (tkinter, idlelib, venv, ...).
STDLIB_MODULES: tuple[str, ...] = tuple(
    """
    __future__ _collections_abc _markupbase _py_abc _pydecimal _pyio _strptime _threading_local _weakrefset abc
    argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd code codecs codeop collections colorsys
    compileall concurrent configparser contextlib contextvars copy copyreg csv ctypes curses dataclasses
    datetime dbm decimal difflib dis doctest email enum filecmp fileinput fnmatch fractions ftplib functools
    genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http imaplib importlib inspect
    io ipaddress json keyword linecache locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc
    ntpath numbers opcode operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib
    posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter runpy
    sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat
    statistics string stringprep struct subprocess symtable sysconfig tabnanny tarfile tempfile textwrap
    threading timeit token tokenize tomllib trace traceback tracemalloc tty types typing unittest urllib uuid
    warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
    """.split()  # noqa: SIM905 - a name a line would be two pages
)
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__"})
TEXT_SUFFIXES = (".txt", ".py", ".md", ".jsonl", ".parquet")


class Document(NamedTuple):
    """One text and the name it is known by."""

    name: str
    text: str


def documents(
    source: str, text_column: str = "text", subset: str | None = None, split: str = "train"
) -> Iterator[Document]:
    """Yield the documents of a source, in a fixed order.

    Args:
        source: ``"stdlib"``; a file or folder of .txt, .py, .md, .jsonl, .parquet (folders are read recursively, by
            name); a folder written by ``Dataset.save_to_disk``; or a data set's name on the Hugging Face Hub.
        text_column: column that holds the text, in .jsonl, .parquet and data sets.
        subset: configuration of a data set, where it has several.
        split: split of a data set.

    Raises:
        FileNotFoundError: if ``source`` looks like a path and is not there.
        ImportError: if reading it needs an extra that is not installed.
        ValueError: if a file cannot be read, or has no such column.
    """
    if source == "stdlib":
        yield from _stdlib()
        return
    path = Path(source).expanduser()
    if path.is_dir() and not _is_saved_dataset(path):
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise ValueError(f"source={source!r}: the folder holds no {', '.join(TEXT_SUFFIXES)} file")
        for file in files:
            yield from _file(file, file.relative_to(path).as_posix(), text_column)
    elif path.is_file():
        if path.suffix not in TEXT_SUFFIXES:
            raise ValueError(f"source={source!r}: unknown suffix {path.suffix!r}; known: {', '.join(TEXT_SUFFIXES)}")
        yield from _file(path, path.name, text_column)
    elif path.exists() or not _looks_like_path(source):
        yield from _dataset(source, path, text_column, subset, split)
    else:
        raise FileNotFoundError(f"source={source!r}: no such file or folder")


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    missing: list[str] = []
    found: list[tuple[str, Path]] = []
    for module in STDLIB_MODULES:
        file, folder = root / f"{module}.py", root / module
        if file.is_file():
            found.append((file.name, file))
        elif folder.is_dir():
            files = (p for p in folder.rglob("*.py") if not TEST_FOLDERS & set(p.relative_to(root).parts[:-1]))
            found += [(p.relative_to(root).as_posix(), p) for p in files]
        else:
            missing.append(module)
    if missing:
        version = ".".join(map(str, sys.version_info[:3]))
        warnings.warn(f"stdlib corpus: Python {version} at {root} lacks {', '.join(missing)}", stacklevel=2)
    for name, file in sorted(found):
        with tokenize.open(file) as stream:  # honours a coding line
            yield Document(name, stream.read())


def _file(path: Path, name: str, text_column: str) -> Iterator[Document]:
    if path.suffix == ".parquet":
        yield from _parquet(path, name, text_column)
        return
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix != ".jsonl":
        yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({one_line(error)})") from error
        columns = list(row) if isinstance(row, dict) else []
        _check_column(text_column, columns, f"{path}, line {number}")
        yield Document(f"{name}:{number}", _text(row[text_column], text_column, f"{path}, line {number}"))


def _parquet(path: Path, name: str, text_column: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'evolute[llm]'") from error
    try:
        table: Any = pq.ParquetFile(path)
        columns = list(table.schema_arrow.names)
    except Exception as error:  # pyarrow's own types, OSError among them
        raise ValueError(f"{path}: not a readable parquet file ({one_line(error)})") from error
    _check_column(text_column, columns, str(path))
    number = 0
    for batch in table.iter_batches(columns=[text_column]):
        for value in batch.column(0).to_pylist():
            yield Document(f"{name}:{number}", _text(value, text_column, f"{path}, row {number}"))
            number += 1


def _dataset(source: str, path: Path, text_column: str, subset: str | None, split: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"source={source!r} needs datasets: pip install 'evolute[llm]'") from error
    try:
        if _is_saved_dataset(path):
            data: Any = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                data = data[split]
        else:
            data = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # hub, network, file and builder errors of a dozen types
        what = f"source={source!r}, subset={subset!r}, split={split!r}"
        raise ValueError(
            f"{what}: not a file, a folder or a data set that can be loaded ({one_line(error)})"
        ) from error
    _check_column(text_column, list(data.column_names), f"source={source!r}")
    for number, value in enumerate(data[text_column]):
        yield Document(f"{split}:{number}", _text(value, text_column, f"source={source!r}, row {number}"))


def _is_saved_dataset(path: Path) -> bool:
    """Say whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.endswith(TEXT_SUFFIXES) or source.count("/") > 1


def _check_column(column: str, columns: list[Any], place: str) -> None:
    if column not in columns:
        raise ValueError(f"{place}: no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}")


def _text(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""  # a null is an empty document, which the data module drops
    if not isinstance(value, str):
        raise ValueError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
    return value
