"""Figures, and the one self-contained HTML page they end up on."""

from evolute.reports.page import draw_figures, save_figures, write_report
from evolute.reports.run import Run, load_run, load_runs
from evolute.reports.summary import print_summary, summary

__all__ = ["Run", "draw_figures", "load_run", "load_runs", "print_summary", "save_figures", "summary", "write_report"]
