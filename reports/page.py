"""The report of one run, or of several side by side: one HTML file that needs no network."""

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

import evolute
from evolute.reports import html
from evolute.reports.completions import completion_html
from evolute.reports.run import Run, load_runs, nonfinite
from evolute.reports.spec import SECTIONS, Section
from evolute.reports.summary import headline

_LONGEST_SAMPLE = 1200  # characters of a prompt or continuation shown


def write_report(runs: Sequence[Run | Path | str], out: Path | str) -> Path:
    """Write the report of one or several runs.

    Args:
        runs: run folders, or runs already loaded.
        out: the HTML file to write; its folder is made if need be. It appears whole or not at all.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: if a folder is not a run folder.
        ValueError: if there is no run.
    """
    out = Path(out)
    text = render(load_runs(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, out)
    return out


def save_figures(
    runs: Sequence[Run | Path | str], folder: Path | str, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Save every figure that has data as ``folder/<key>.<format>``, on white, and return the paths."""
    folder, written = Path(folder), list[Path]()
    folder.mkdir(parents=True, exist_ok=True)
    for key, figure in draw_figures(load_runs(runs)):
        for kind in formats:
            path = folder / f"{key}.{kind}"
            figure.savefig(path, format=kind, dpi=150, facecolor="white")
            written.append(path)
    return written


def draw_figures(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """Yield the key and the figure of every section that has data."""
    for section in SECTIONS:
        if section.found(runs):
            yield section.key, section.draw(runs)


def render(runs: Sequence[Run]) -> str:
    """Return the page as text."""
    shown = [section for section in SECTIONS if section.found(runs) or not section.optional]
    figures = [(section.key, section.title, _figure(section, runs)) for section in shown]
    texts = [_samples(runs), _completions(runs), _config(runs), _environment(runs)]
    blocks = [block for block in [_differences(runs), *figures, *texts] if block[2]]
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in blocks)
    names = " · ".join(run.name for run in runs)
    header = (
        f"<h1>{escape(names)}</h1>{_subtitle(runs)}{_numbers(runs)}{_warnings(runs)}"
        f'<nav aria-label="Contents"><ol>{links}</ol></nav>'
    )
    main = "\n".join(html.section_block(key, title, body, long=key in _LONG) for key, title, body in blocks)
    footer = f"Written by evolute {escape(evolute.__version__)}. The x-axis of every figure is the optimizer step."
    return html.page(f"{names} – evolute report", header, main, footer)


_LONG = ("samples", "completions", "config", "environment", "differences")  # may break across printed pages


def _figure(section: Section, runs: Sequence[Run]) -> str:
    if not section.found(runs):
        return html.paragraph(section.reason(), "reason")
    return html.figure_block(section.draw(runs), section.key, section.title, section.good)


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return html.paragraph(f"{len(runs)} runs side by side", "muted")
    steps = max(int(steps[-1]) for steps, _ in runs[0].metrics.values()) + 1
    return html.paragraph(
        f"{steps:,} optimizer steps, {len(runs[0].metrics)} metrics recorded · {runs[0].folder}", "muted"
    )


def _numbers(runs: Sequence[Run]) -> str:
    """Return the five numbers: cards for one run, a table for several."""
    numbers = [headline(run) for run in runs]
    if len(runs) == 1:
        cards = "".join(
            f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd>'
            f'<dd class="why">{escape(note)}</dd></div>'
            for label, value, note in numbers[0]
        )
        return f'<dl class="cards">{cards}</dl>'
    rows = [
        [run.name, *(f"{value} ({note})" for _, value, note in own)] for run, own in zip(runs, numbers, strict=True)
    ]
    return html.table("The numbers that matter", ["run", *(label for label, _, _ in numbers[0])], rows)


def _warnings(runs: Sequence[Run]) -> str:
    """Return a line on every metric with NaN or infinite values: figures leave them out, a reader must know."""
    lines = [
        f"{run.name}: {count} non-finite value{'s' * (count > 1)} in {name}, first at step {step}; not in the figures."
        for run in runs
        for name, (count, step) in list(nonfinite(run).items())[:10]
    ]
    return "".join(html.paragraph(line, "reason warn") for line in lines)


def _samples(runs: Sequence[Run]) -> tuple[str, str, str]:
    """Return the continuations of the last step, and those of earlier steps folded away."""
    body = ""
    for run in runs:
        steps = sorted({int(s["step"]) for s in run.samples if isinstance(s.get("step"), int | float)}, reverse=True)
        # Enough to see it learn, not a transcript: the first, the middle and the last.
        for step in dict.fromkeys([*steps[:1], *steps[len(steps) // 2 :][:1], *steps[-1:]]):
            texts = "".join(
                f'<pre><span class="prompt">{escape(_clip(sample.get("prompt")))}</span>'
                f"{escape(_clip(sample.get('text')))}</pre>"
                for sample in run.samples
                if sample.get("step") == step
            )
            title = f"{run.name}, step {step:,}" if len(runs) > 1 else f"Step {step:,}"
            body += f"<details{' open' * (step == steps[0])}><summary>{escape(title)}</summary>{texts}</details>"
    if body:
        body = (
            html.paragraph(
                "Each prompt in grey, then its continuation. Good: later steps close brackets, repeat "
                "less and look more like the corpus than earlier ones."
            )
            + body
        )
    return "samples", "Sample continuations", body


def _completions(runs: Sequence[Run]) -> tuple[str, str, str]:
    """Return rewarded answers of the last, a middle and the first table, token by token."""
    body = ""
    for run in runs:
        steps = sorted({int(c["step"]) for c in run.completions if isinstance(c.get("step"), int)}, reverse=True)
        for step in dict.fromkeys([*steps[:1], *steps[len(steps) // 2 :][:1], *steps[-1:]]):
            lines = "".join(
                f"<tr><td><code>{completion_html(row)}</code></td><td>{_number(row.get('reward'))}</td>"
                f"<td>{_number(row.get('advantage'))}</td></tr>"
                for row in run.completions
                if row.get("step") == step
            )
            title = f"{run.name}, step {step:,}" if len(runs) > 1 else f"Step {step:,}"
            head = '<tr><th scope="col">completion</th><th scope="col">reward</th><th scope="col">advantage</th></tr>'
            body += (
                f"<details{' open' * (step == steps[0])}><summary>{escape(title)}</summary>"
                f'<div class="scroll"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div></details>'
            )
    if body:
        body = (
            html.paragraph(
                "Each prompt in grey, then its tokens: the darker, the further the token's own step is predicted to "
                "move the policy; struck through where it was rejected. A square is a token without text."
            )
            + body
        )
    return "completions", "Completions, token by token", body


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "none"


def _clip(text: object) -> str:
    written = "" if text is None else str(text)
    return written if len(written) <= _LONGEST_SAMPLE else written[:_LONGEST_SAMPLE] + " …"


def _differences(runs: Sequence[Run]) -> tuple[str, str, str]:
    """Return a table of the settings in which the runs differ."""
    known = {run.name: html.flatten(run.config) for run in runs if run.config}
    keys = list(dict.fromkeys(key for flat in known.values() for key in flat))
    rows = [[key, *(flat.get(key, "–") for flat in known.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    body = html.table("Settings that are not equal", ["setting", *known], rows) if rows else ""
    return "differences", "What differs between the runs", body


def _config(runs: Sequence[Run]) -> tuple[str, str, str]:
    body = "".join(
        f"<details><summary>{escape(f'{run.name}/{name}')}</summary><pre>{escape(text)}</pre></details>"
        for run in runs
        for name, text in run.config_files.items()
    )
    return "config", "Configuration, resolved", body or html.paragraph("The run folder holds no config.yaml.", "reason")


def _environment(runs: Sequence[Run]) -> tuple[str, str, str]:
    flats = [html.flatten(run.environment) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = [[key, *(flat.get(key, "–") for flat in flats)] for key in keys]
    header = ["item", *(run.name for run in runs)] if len(runs) > 1 else ["item", "value"]
    body = html.table("Versions, machine and data of the run", header, rows) if rows else ""
    return "environment", "Environment", body or html.paragraph("The run folder holds no environment.json.", "reason")
