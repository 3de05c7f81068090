"""Reading documents, and what bad input says."""

import json
import os
import sys

import datasets
import pyarrow as pa
import pytest

from evolute.data import STDLIB_MODULES, TextDataModule, documents


def write_parquet(path, **columns):
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def test_stdlib_is_sorted_source_code_without_tests():
    docs = list(documents("stdlib"))
    names = [d.name for d in docs]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/events.py"} <= set(names)
    assert not [n for n in names if "/test/" in n or "/tests/" in n]
    assert list(STDLIB_MODULES) == sorted(STDLIB_MODULES)
    assert set(STDLIB_MODULES) <= sys.stdlib_module_names
    assert sum(len(d.text) for d in docs) > 5_000_000


def test_missing_modules_are_named(monkeypatch):
    monkeypatch.setattr("evolute.data.sources.STDLIB_MODULES", ("abc", "nonesuch"))
    with pytest.warns(UserWarning, match="lacks nonesuch"):
        assert [d.name for d in documents("stdlib")] == ["abc.py"]


def test_a_folder_gives_every_kind_of_file_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes("Zeilen\r\nmit ä".encode())
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two\u2028still two"}\n', encoding="utf-8")
    (tmp_path / "d.md").write_text("# md")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    write_parquet(tmp_path / "e.parquet", text=["three", None])
    assert [tuple(d) for d in documents(str(tmp_path))] == [
        ("a.txt", "Zeilen\r\nmit ä"),
        ("b/c.jsonl:1", "one"),
        ("b/c.jsonl:3", "two\u2028still two"),
        ("d.md", "# md"),
        ("e.parquet:0", "three"),
        ("e.parquet:1", ""),
    ]
    assert [d.text for d in documents(str(tmp_path / "d.md"))] == ["# md"]


def test_a_saved_dataset_and_another_column(tmp_path):
    data = datasets.Dataset.from_dict({"body": ["one", "two"]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert [d.text for d in documents(str(tmp_path / "one"), text_column="body")] == ["one", "two"]
    assert [d.text for d in documents(str(tmp_path / "two"), text_column="body", split="test")] == ["two"]
    with pytest.raises(ValueError, match="no column 'text'; it has 'body'"):
        list(documents(str(tmp_path / "one")))


BAD_FILES = [
    ("x.txt", b"\xff\xfe", "x.txt: not UTF-8 text"),
    ("x.jsonl", b'{"text": "a"}\n{"text', "x.jsonl, line 2: not JSON"),
    ("x.jsonl", b'{"txt": "a"}', "line 1: no column 'text'; it has 'txt'"),
    ("x.jsonl", b'{"text": 3}', "column 'text' holds int, not text"),
    ("x.jsonl", b"[1]", "no column 'text'; it has none"),
    ("x.parquet", b"PAR1 not really", "x.parquet: not a readable parquet file"),
    ("x.csv", b"a", "unknown suffix '.csv'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named_on_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/corpus", "nowhere.txt", "a/b/c"])
def test_a_missing_path_is_not_looked_up_elsewhere(source):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list(documents(source))


def test_an_unknown_name_offline_fails_at_once():
    # In a process of its own: the libraries read these variables when they are imported.
    import subprocess

    code = """
from evolute.data import documents, load_tokenizer
for call in (lambda: list(documents("nobody/nonesuch")), lambda: load_tokenizer("nobody/nonesuch")):
    try:
        call()
    except ValueError as error:
        assert "nobody/nonesuch" in str(error) and "\\n" not in str(error), error
    else:
        raise SystemExit("no error")
"""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


BAD_ARGUMENTS = [
    {"context": 0},
    {"batch_size": 0},
    {"num_workers": -1},
    {"max_bytes": 0},
    {"val_fraction": 0.0},
    {"val_fraction": 1.0},
    {"source": ""},
]


@pytest.mark.parametrize("kwargs", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_the_constructor(kwargs):
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        TextDataModule(**kwargs)


def module(tmp_path, *texts, **kwargs):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return TextDataModule(str(tmp_path), **{"context": 8, "batch_size": 2, "val_fraction": 0.3} | kwargs)


def test_a_corpus_that_does_not_serve_is_refused_in_setup(tmp_path):
    for texts, message in (((), "the corpus is empty"), (("", ""), "the corpus is empty")):
        with pytest.raises(ValueError, match=message):
            module(tmp_path, *texts).setup()
    with pytest.raises(ValueError, match=r"gives \d training windows of 8 tokens, a batch takes 64"):
        module(tmp_path, *(f"document {i}" for i in range(9)), batch_size=64).setup()
    with pytest.raises(ValueError, match="gives no validation window of 8 tokens"):
        module(tmp_path, "x" * 100, val_fraction=0.02).setup()
    with pytest.raises(ValueError, match="max_bytes=3 is less than the first document"):
        module(tmp_path, "abcdef", max_bytes=3).setup()
