"""What reaches Weights & Biases (offline) and TensorBoard, read back from the files they wrote."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import recipe
from tests.cli.test_kill import rows

RATIO = "lr_ratio/model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, evolute) -> Path:
    """A run of six steps with both loggers on, resumed for three more."""
    work = tmp_path_factory.mktemp("logged")
    recipe(work, corpus)
    fit = ["fit", "--config", "tiny.yaml", "--run", "run", "--wandb", "true", "--tensorboard", "true"]
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for more in ([], ["--resume", "--trainer.max_steps", "9"]):
        result = evolute(*fit, *more, cwd=work, **offline)
        assert result.code == 0, result.err
        assert "Traceback" not in result.err
        assert {p.name for p in work.iterdir()} == {"run", "tiny.yaml"}
    return work / "run"


def chunks(log: bytes) -> Iterator[bytes]:
    """Yield the entries of a W&B file: LevelDB's log format (blocks of 32 KiB) behind a header of 7 bytes."""
    block, at, parts = 32768, 7, b""
    while at + 7 <= len(log):
        if block - at % block < 7:  # no header fits in the rest of a block
            at += block - at % block
            continue
        size, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        parts += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def records(run: Path) -> dict[str, list[Any]]:
    """Read the offline files of a run: its records by kind, in the order of the files."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[Any]] = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in chunks(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
    return found


def history(run: Path) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.item}
        for entry in records(run)["history"]
    ]


def test_wandb_has_the_scalars_of_the_csv_at_their_steps(run):
    logged: dict[tuple[int, str], float] = {}
    for entry in history(run):
        step = entry.get("trainer/global_step")
        logged.update({(step, k): v for k, v in entry.items() if isinstance(v, int | float) and "/" in k})
    for row in rows(run):
        for name in ("train/loss", "val/loss", RATIO):
            if name in row:
                assert logged[int(row["step"]), name] == pytest.approx(float(row[name]), rel=1e-5), (name, row["step"])
    assert {step for step, name in logged if name == "train/loss"} == set(range(9))


def test_wandb_has_figures_a_table_and_the_configuration(run):
    values = {key: value for entry in history(run) for key, value in entry.items()}
    figures = [k for k, v in values.items() if k.startswith("report/") and k.endswith("/_type") and "image" in v]
    assert figures
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/report/*.png"))) >= len(figures)
    assert values["samples/_type"] == "table-file"
    tables = [json.loads(p.read_text()) for p in run.glob("wandb/offline-run-*/files/media/table/*.table.json")]
    assert tables
    assert all(t["columns"] == ["step", "prompt", "text"] and t["data"] for t in tables)
    settings = {item.key or item.nested_key[0] for entry in records(run)["config"] for item in entry.update}
    assert {"model", "data", "trainer", "seed_everything"} <= settings


def test_wandb_goes_on_with_the_same_run(run):
    run_id = (run / "wandb" / "run_id").read_text()
    starts = records(run)["run"]
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert {entry.run_id for entry in starts} == {run_id}
    assert {entry.display_name for entry in starts} == {"run"}


def test_tensorboard_has_the_scalars_figures_and_text(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    for name in ("train/loss", "val/loss", RATIO):
        expected = {int(r["step"]): float(r[name]) for r in rows(run) if name in r}
        got = {e.step: e.value for e in events.Scalars(name)}
        assert got == pytest.approx(expected, rel=1e-5), name
    assert any(tag.startswith("report/") for tag in tags["images"])
    text = events.Tensors("samples/text_summary")
    assert {e.step for e in text} == {3, 6, 9}
    first = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"].split()[0] in text[0].tensor_proto.string_val[0].decode()
