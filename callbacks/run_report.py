"""The report of a run, written when its fit ends, however it ends."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from typing_extensions import override

from evolute.callbacks.record import run_folder
from evolute.reports import Run, draw_figures, load_run, print_summary, write_report


class RunReport(Callback):
    """Write ``report.html`` into the run folder at the end of fit, and print the numbers that matter.

    The page is made from the run's ``metrics.csv``, so the Trainer needs a logger that writes one: evolute's own, or
    Lightning's ``CSVLogger``. Loggers that take images (Weights & Biases, TensorBoard) receive every figure once. A fit
    that ends in an exception or by Ctrl-C is reported as far as it got. A report that cannot be written is a warning,
    never an error: the run matters more than its page.

    Example::

        Trainer(logger=CSVLogger("runs"), callbacks=[LayerMonitor(), RunReport()])

    Args:
        path: the page, relative to the run folder (where ``metrics.csv`` is) or absolute.

    Raises:
        MisconfigurationException: if ``path`` does not end in ``.html``.
    """

    def __init__(self, path: str = "report.html") -> None:
        if not path.endswith(".html"):
            raise MisconfigurationException(f"RunReport(path={path!r}): must end in .html")
        self.path = path
        self._trained = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = True

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not on_fit_end: other callbacks may still record there. Loggers are finalized after this hook.
        if stage == TrainerFn.FITTING:
            self._report(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown hook after an exception. A fit refused before its first step wrote nothing, and
        # what an earlier start left in the folder is not to be touched.
        if self._trained and trainer.state.fn == TrainerFn.FITTING:
            self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        try:
            for logger in trainer.loggers:
                _flush(logger)
            run = load_run(run_folder(trainer) or Path(trainer.default_root_dir))
            page = write_report([run], run.folder / self.path)
            print_summary(run, page)
        except Exception as error:
            rank_zero_warn(f"RunReport wrote no report: {error}")
            return
        try:
            _send_figures(run, trainer.loggers)
        except Exception as error:
            rank_zero_warn(f"RunReport sent no figures to the loggers: {error}")


def _flush(logger: Logger) -> None:
    """Make a logger write what it holds: ``flush`` where it has one, for ``save`` may leave it to later."""
    flush: Any = getattr(logger, "flush", logger.save)
    flush()


def _send_figures(run: Run, loggers: list[Logger]) -> None:
    """Send every figure as an image to each logger with ``log_image`` or an experiment with ``add_image``."""
    untyped: list[Any] = list(loggers)
    takers = [it for it in untyped if hasattr(it, "log_image") or hasattr(it.experiment, "add_image")]
    if not takers:
        return
    for key, figure in draw_figures([run]):
        figure.patch.set(facecolor="white", alpha=1)
        pixels = _pixels(figure)
        for logger in takers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"report/{key}", [pixels])
            else:
                logger.experiment.add_image(f"report/{key}", pixels, dataformats="HWC")


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as RGB [height, width, 3]."""
    figure.set_dpi(120)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
