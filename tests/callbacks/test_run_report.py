"""RunReport writes a page however a fit ends, hides no exception, and touches nothing else."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from evolute.callbacks.run_report import RunReport


class Logging(BoringModel):
    """Logs its loss, and raises ``error`` at step 5 if given one."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.error is not None and batch_idx == 5:
            raise self.error
        out = super().training_step(batch, batch_idx)
        self.log("train/loss", out["loss"])
        return out


class ImageLogger(Logger):
    """Takes images as WandbLogger does; ``experiment`` takes them as TensorBoard's writer does."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.images: dict[str, Any] = {}
        if direct:
            self.log_image = lambda key, images: self.images.update({key: images[0]})

    name, version = "images", 0

    @property
    def experiment(self):
        return self

    def add_image(self, tag, image, dataformats):
        assert dataformats == "HWC"
        self.images[tag] = image

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, *args, **kwargs): ...


def fit(root, *, error=None, callbacks=(), loggers=None, report=None, seed=0):
    L.seed_everything(seed)
    model = Logging(error)
    logger = [CSVLogger(root, name="", version="run", flush_logs_every_n_steps=1000)] if loggers is None else loggers
    trainer = L.Trainer(
        default_root_dir=root, max_steps=10, limit_val_batches=0, logger=logger, log_every_n_steps=1,
        callbacks=[*callbacks, report or RunReport()], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model)
    return model


def test_page_and_summary_at_the_end_of_fit(tmp_path, capsys):
    fit(tmp_path)
    page = tmp_path / "run" / "report.html"
    assert "10 optimizer steps" in page.read_text()
    assert f"Report: {page}" in capsys.readouterr().out.replace("\n", "")


def test_an_exception_is_reported_and_still_raised(tmp_path):
    with pytest.raises(ZeroDivisionError, match="at step five"):
        fit(tmp_path, error=ZeroDivisionError("at step five"))
    assert "5 optimizer steps" in (tmp_path / "run" / "report.html").read_text()


def test_ctrl_c_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *args: None)  # Lightning would ignore Ctrl-C for the rest of the tests
    with pytest.raises(SystemExit):
        fit(tmp_path, error=KeyboardInterrupt())
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_fit_refused_before_its_first_step_leaves_the_folder_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1\n")

    class Refuse(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise MisconfigurationException("no")

    with pytest.raises(MisconfigurationException):
        fit(tmp_path, callbacks=[Refuse()], loggers=[])
    assert not (tmp_path / "report.html").exists()


def test_without_metrics_it_warns_and_the_fit_stands(tmp_path):
    with pytest.warns(UserWarning, match=r"RunReport wrote no report: .*no metrics\.csv"):
        fit(tmp_path, loggers=[])


def test_a_report_that_fails_never_hides_the_exception(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("evolute.callbacks.run_report.write_report", broken)
    with pytest.warns(UserWarning, match="disk full"), pytest.raises(ZeroDivisionError):
        fit(tmp_path, error=ZeroDivisionError())


@pytest.mark.parametrize("direct", [True, False])
def test_loggers_that_take_images_get_every_figure_once(tmp_path, direct):
    images = ImageLogger(direct)
    fit(tmp_path, loggers=[CSVLogger(tmp_path, name="", version="run"), images])
    assert set(images.images) == {"report/loss"}
    picture = images.images["report/loss"]
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.max() == 255
    assert picture.std() > 5


def test_metrics_held_back_by_a_logger_are_flushed_first(tmp_path):
    class Lazy(Logger):
        name, version, rows = "lazy", 0, 0

        @property
        def save_dir(self):
            return str(tmp_path / "lazy")

        @property
        def experiment(self):
            return self

        def log_metrics(self, metrics, step=None):
            self.rows += 1

        def log_hyperparams(self, *args, **kwargs): ...

        def flush(self):
            (tmp_path / "lazy").mkdir(exist_ok=True)
            rows = "".join(f"{i},1\n" for i in range(self.rows))
            (tmp_path / "lazy" / "metrics.csv").write_text("step,train/loss\n" + rows)

    fit(tmp_path, loggers=[Lazy()])
    assert "10 optimizer steps" in (tmp_path / "lazy" / "report.html").read_text()


def test_the_run_is_the_same_with_and_without_it(tmp_path):
    with_report = fit(tmp_path / "a")
    state = torch.get_rng_state()
    without = fit(tmp_path / "b", report=Callback())
    assert all(torch.equal(p, q) for p, q in zip(with_report.parameters(), without.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_refuses_a_path_that_is_no_page():
    with pytest.raises(MisconfigurationException, match=r"report\.pdf"):
        RunReport(path="report.pdf")
