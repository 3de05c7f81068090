"""``evolute report``: the page of one run, or of several side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def report_command(argv: Sequence[str]) -> None:
    """Run ``evolute report RUN... [--out FILE] [--figures DIR]``.

    Raises:
        ValueError: for arguments that make no sense.
        OSError: for a folder that is not a run, or a file that cannot be written.
    """
    parser = _Parser("evolute report", description="Write the HTML report of one or several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are shown side by side")
    parser.add_argument(
        "--out", type=Path, help="page to write (default: RUN/report.html, or ./report.html for several)"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also save every figure there as PNG and SVG")
    options = parser.parse_args(argv)

    # After parsing: matplotlib takes a moment, and --help should not.
    from evolute.reports.page import save_figures, write_report
    from evolute.reports.run import load_runs
    from evolute.reports.summary import print_summary

    runs = load_runs(options.runs)
    out = options.out or (Path(options.runs[0]) if len(runs) == 1 else Path()) / "report.html"
    page = write_report(runs, out)
    if options.figures:
        save_figures(runs, options.figures)
    for run in runs:
        print_summary(run, page)
