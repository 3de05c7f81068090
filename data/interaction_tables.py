"""Interactions and items from files: columns of csv, tsv, jsonl, parquet; RecBole and MovieLens folders; data sets."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evolute.data.movielens import movielens_folder
from evolute.data.tokenizers import one_line

Array = NDArray[Any]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".inter", ".item")
GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


class Events(NamedTuple):
    """Interactions in the order of their file.

    Attributes:
        users: user names, [events], str.
        items: item names, [events], str.
        times: seconds or any other order, [events], float64; None where the file has none.
        ratings: [events], float64, or None.
        place: what messages call the file.
    """

    users: Array
    items: Array
    times: NDArray[np.float64] | None
    ratings: NDArray[np.float64] | None
    place: str


class ItemTexts(NamedTuple):
    """What is known of items, by name.

    Attributes:
        title: name -> title.
        text: name -> the text an encoder reads; an item without one is absent.
        genre: name -> first genre.
    """

    title: dict[str, str]
    text: dict[str, str]
    genre: dict[str, str]


def read_events(
    source: str,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = "timestamp",
    rating: str | None = None,
    split: str = "train",
) -> Events:
    """Read interactions.

    Args:
        source: ``"ml-100k"``; a .csv, .tsv, .jsonl, .parquet or RecBole .inter file; a folder in RecBole's or
            MovieLens's layout; a folder of ``Dataset.save_to_disk`` or a data set's name on the Hugging Face Hub.
        user: name of the column of users; files with fixed names (RecBole, MovieLens) bring their own.
        item: of items.
        time: of times; None takes the order of the file for the order of time.
        rating: of ratings, if they are to be used.
        split: split of a data set.

    Raises:
        FileNotFoundError: if a path is not there.
        ValueError: if a column is missing, or a value of it is.
    """
    columns = {"user": user, "item": item, "time": time, "rating": rating}
    path = movielens_folder() if source == "ml-100k" else Path(source).expanduser()
    file, table = _find_events(source, path, split)
    if file is not None and file.name in ("u.data", "ratings.dat", "ratings.csv"):
        columns = {"user": "user", "item": "item", "time": time and "time", "rating": rating and "rating"}
    read = {what: _column(table, name, str(file or source)) for what, name in columns.items() if name is not None}
    hint = "; time_column: null takes the order of the file instead"
    for what in ("time", "rating"):
        if what in read:
            read[what] = _numbers(read[what], columns[what] or what, str(file or source), hint * (what == "time"))
    users, items = (_names(read[what], columns[what] or what, str(file or source)) for what in ("user", "item"))
    if len(users) == 0:
        raise ValueError(f"{file or source}: holds no interactions")
    return Events(users, items, read.get("time"), read.get("rating"), str(file or source))


def _find_events(source: str, path: Path, split: str) -> tuple[Path | None, Any]:
    if path.is_dir() and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        for name, reader in _MOVIELENS.items():
            if (path / name).is_file():
                return path / name, reader(path / name)
        found = sorted(path.glob("*.inter"))
        if not found:
            raise ValueError(f"source={source!r}: the folder holds no .inter, u.data, ratings.dat or ratings.csv file")
        return found[0], read_table(found[0])
    if path.is_file():
        return path, read_table(path)
    if not path.exists() and (source.startswith((".", "/", "~")) or path.suffix in SUFFIXES):
        raise FileNotFoundError(f"source={source!r}: no such file or folder")
    return None, _dataset(source, path, split)


def read_items(
    source: str,
    text: str | None = None,
    item: str = "item_id",
    title: str | None = None,
    genre: str | None = None,
) -> ItemTexts:
    """Read titles, genres and texts of items; a source without them gives empty ones.

    The text is ``"{title} ({year}). Genres: {genres}"`` for MovieLens, or the column ``text``.

    Args:
        source: as for :func:`read_events`, or a table of items of its own with a column ``item``.
        text: column of a table of items that holds the text.
        item: column of a table of items that holds the name.
        title: column of titles; None takes the beginning of the text.
        genre: column of genres, the first word of which counts, for colours.

    Raises:
        ValueError: if the table has no such column, or two texts of one item.
    """
    path = movielens_folder() if source == "ml-100k" else Path(source).expanduser()
    if path.is_dir():
        for name, reader in (("u.item", _u_item), ("movies.dat", _movies), ("movies.csv", _movies)):
            if (path / name).is_file():
                return reader(path / name)
        found = sorted(path.glob("*.item"))
        return _movie_rows(read_table(found[0]), str(found[0])) if found else ItemTexts({}, {}, {})
    if text is None and title is None and genre is None:
        return ItemTexts({}, {}, {})
    table = read_table(path)
    names = _names(_column(table, item, source), item, source).tolist()

    def known(column: str | None) -> dict[str, str]:
        if column is None:
            return {}
        texts = [str(t).strip() if t is not None else "" for t in _column(table, column, source)]
        found: dict[str, str] = {}
        for row, (name, value) in enumerate(zip(names, texts, strict=True), 1):
            if value and found.setdefault(name, value) != value:
                raise ValueError(f"{source}: item {name!r} has another {column!r} in row {row}: keep one row an item")
        return found

    texts = known(text)
    titles = known(title) or {n: t.splitlines()[0][:60] for n, t in texts.items()}
    return ItemTexts(titles, texts, {n: g.split()[0] for n, g in known(genre).items()})


def read_table(path: Path) -> Any:
    """Return the pyarrow table of a file, RecBole's ``name:type`` headers without their types.

    Raises:
        ValueError: if the file cannot be read as what its suffix says.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    csv, json, parquet = _pyarrow(str(path))
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        if path.suffix == ".jsonl":
            return json.read_json(path)
        return _delimited(csv, path, "," if path.suffix == ".csv" else "\t")
    except Exception as error:  # pyarrow's own types, UnicodeDecodeError, OSError
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error


def _delimited(csv: Any, path: Path, delimiter: str, names: list[str] | None = None, encoding: str = "utf8") -> Any:
    quote = '"' if path.suffix == ".csv" else False
    table = csv.read_csv(
        path,
        read_options=csv.ReadOptions(column_names=names, encoding=encoding),
        parse_options=csv.ParseOptions(delimiter=delimiter, quote_char=quote),
        convert_options=csv.ConvertOptions(strings_can_be_null=True, null_values=[""]),
    )
    return table.rename_columns([name.split(":")[0] for name in table.column_names])


def _pyarrow(place: str) -> tuple[Any, Any, Any]:
    try:
        from pyarrow import csv, json, parquet
    except ImportError as error:
        raise ImportError(f"{place} needs pyarrow: pip install 'evolute[recommender]'") from error
    return csv, json, parquet


def _double_colon(path: Path) -> Any:
    import pyarrow

    rows = [line.split("::") for line in path.read_text("latin-1").splitlines() if line]
    return pyarrow.table(dict(zip(("user", "item", "rating", "time"), map(list, zip(*rows, strict=True)), strict=True)))


def _u_data(path: Path) -> Any:
    return _delimited(_pyarrow(str(path))[0], path, "\t", ["user", "item", "rating", "time"])


def _ratings_csv(path: Path) -> Any:
    table = _delimited(_pyarrow(str(path))[0], path, ",")
    known = {"userId": "user", "movieId": "item", "rating": "rating", "timestamp": "time"}
    return table.rename_columns([known.get(name, name) for name in table.column_names])


_MOVIELENS = {"u.data": _u_data, "ratings.dat": _double_colon, "ratings.csv": _ratings_csv}


def _u_item(path: Path) -> ItemTexts:
    rows = [line.split("|") for line in path.read_text("latin-1").splitlines() if line]
    genres = [" ".join(g for g, flag in zip(GENRES_100K, r[5:], strict=False) if flag == "1") for r in rows]
    years = [r[2][-4:] for r in rows]
    return _texts([r[0] for r in rows], [_without_year(r[1]) for r in rows], years, genres)


def _movies(path: Path) -> ItemTexts:
    if path.suffix == ".dat":
        rows = [line.split("::") for line in path.read_text("latin-1").splitlines() if line]
    else:
        table = read_table(path).to_pydict()
        rows = list(zip(*(map(str, table[c]) for c in ("movieId", "title", "genres")), strict=True))
    years = [r[1][-5:-1] if r[1].endswith(")") else "" for r in rows]
    return _texts(
        [r[0] for r in rows], [_without_year(r[1]) for r in rows], years, [r[2].replace("|", " ") for r in rows]
    )


def _without_year(title: str) -> str:
    return title[:-7] if title.endswith(")") and title[-6:-5] == "(" else title


def _movie_rows(table: Any, place: str) -> ItemTexts:
    """RecBole's .item: a name, and for films title, year and class."""
    columns = table.column_names
    names = _names(_column(table, "item_id", place), "item_id", place).tolist()

    def strings(column: str) -> list[str]:
        return (
            ["" if v is None else str(v) for v in table[column].to_pylist()] if column in columns else [""] * len(names)
        )

    title = next((c for c in columns if c.endswith("title")), "title")
    genres = next((c for c in ("class", "genre", "genres", "categories") if c in columns), "class")
    return _texts(names, strings(title), strings("release_year"), strings(genres))


def _texts(names: list[str], titles: list[str], years: list[str], genres: list[str]) -> ItemTexts:
    text: dict[str, str] = {}
    for name, title, year, genre in zip(names, titles, years, genres, strict=True):
        if title.strip():
            text[name] = title + (f" ({year})" if year else "") + (f". Genres: {genre}" if genre else "")
    first = {n: g.split()[0] if g.split() else "unknown" for n, g in zip(names, genres, strict=True)}
    return ItemTexts(dict(zip(names, titles, strict=True)), text, first)


def _dataset(source: str, path: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"source={source!r} needs datasets: pip install 'evolute[recommender]'") from error
    try:
        if path.is_dir():
            data: Any = datasets.load_from_disk(str(path))
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source, split=split)
    except Exception as error:  # hub, network, file and builder errors of a dozen types
        raise ValueError(f"source={source!r}: not a file, a folder or a data set ({one_line(error)})") from error
    return data.with_format("arrow")[:]


def _column(table: Any, name: str, place: str) -> Array:
    if name not in table.column_names:
        raise ValueError(f"{place}: no column {name!r}; it has {', '.join(map(repr, table.column_names))}")
    return table[name].to_numpy(zero_copy_only=False) if hasattr(table[name], "combine_chunks") else table[name]


def _names(values: Array, column: str, place: str) -> Array:
    """Return names as str: 3, 3.0 and "3" are one name."""
    if values.dtype.kind == "f":
        _refuse_missing(np.isnan(values), column, place)
        values = values.astype(np.int64) if bool((values == np.floor(values)).all()) else values
    elif values.dtype.kind == "O":
        _refuse_missing(np.array([v is None for v in values], bool), column, place)
    return values.astype(str)


def _numbers(values: Array, column: str, place: str, hint: str) -> NDArray[np.float64]:
    """Return numbers; dates become seconds."""
    if values.dtype.kind == "M":
        _refuse_missing(np.isnat(values), column, place, hint)
        return values.astype("datetime64[us]").astype(np.int64) / 1e6
    try:
        numbers = np.array([math.nan if v is None else float(v) for v in values.tolist()])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: column {column!r} holds {one_line(error)}, numbers are needed") from error
    _refuse_missing(~np.isfinite(numbers), column, place, hint)
    return numbers


def _refuse_missing(missing: NDArray[np.bool_], column: str, place: str, hint: str = "") -> None:
    if missing.any():
        raise ValueError(
            f"{place}: column {column!r} has no value in {int(missing.sum())} of {len(missing)} rows, first in row "
            f"{int(np.flatnonzero(missing)[0]) + 1}: fill or drop them{hint}"
        )
