"""The parts of a page: tables, figures and text, everything from a run escaped."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure

from evolute.reports import style

CSS = """
:root{color-scheme:light dark;--page:#fff;--card:#fff;--ink:#1f2430;--muted:#626a78;--grid:#e4e7eb;--line:#d9dde4;
--tint:#f5f7fa;--accent:#0072b2;--bad:#b34700}
@media (prefers-color-scheme:dark){:root{--page:#14171d;--card:#1a1e26;--ink:#e6e9ef;--muted:#9aa3b2;--grid:#2b313c;
--line:#303744;--tint:#20252e;--accent:#56b4e9;--bad:#ff9d57}}
*{box-sizing:border-box}html{scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Liberation Sans",sans-serif}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 24px}header{padding-top:36px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 4px}h2{font-size:1.2rem;margin:0 0 10px}
p{margin:8px 0;max-width:80ch}.muted,.note{color:var(--muted)}a{color:var(--accent)}
.cards{display:grid;grid-template-columns:repeat(5,1fr);gap:12px;margin:18px 0 8px;padding:0}
.cards div{border:1px solid var(--line);border-radius:8px;padding:12px 14px;background:var(--card)}
.cards dt{font-size:.8rem;color:var(--muted)}.cards dd{margin:0}
.cards .value{font-size:1.6rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.cards .why{font-size:.8rem;line-height:1.35;color:var(--muted)}
nav{margin:18px 0 0}nav ol{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.9rem}
section{border-top:1px solid var(--line);margin-top:30px;padding-top:22px}
figure{margin:0}figure svg{width:100%;height:auto;display:block}figcaption{max-width:85ch;font-size:.93rem;
margin-top:6px}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;width:100%}caption{text-align:left;color:var(--muted);padding:4px 0}
th,td{text-align:left;vertical-align:top;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}th[scope=row]{font-weight:500;color:var(--muted);white-space:nowrap}
pre,code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
pre{background:var(--tint);padding:12px 14px;border-radius:8px;overflow-x:auto;margin:8px 0;white-space:pre-wrap;
overflow-wrap:anywhere}pre .prompt{color:var(--muted)}
details{margin:10px 0}summary{cursor:pointer;font-weight:500}.reason{background:var(--tint);border-left:3px solid
var(--line);padding:10px 14px;border-radius:0 8px 8px 0}.warn{border-left-color:var(--bad)}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em}
footer{margin-top:36px;padding-bottom:36px;font-size:.85rem;color:var(--muted)}
@media(max-width:820px){.cards{grid-template-columns:repeat(2,1fr)}figure{overflow-x:auto}figure svg{min-width:640px}}
@media print{:root{--page:#fff;--card:#fff;--ink:#1f2430;--muted:#626a78;--grid:#e4e7eb;--line:#d9dde4;--tint:#f5f7fa}
body{font-size:11pt}nav{display:none}main,header,footer{max-width:none;padding:0}section,figure,.cards div{
break-inside:avoid}section.long{break-inside:auto}a{color:inherit;text-decoration:none}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VARIABLES = {style.INK: "var(--ink)", style.MUTED: "var(--muted)", style.GRID: "var(--grid)"}


def svg_text(figure: Figure, key: str) -> str:
    """Return a figure as an inline ``<svg>`` element.

    Text stays text, so it is searchable and small; colours of ink and grid become CSS variables; ids get the prefix
    ``key``, for several figures share a page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None, "Format": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, 'Liberation Sans', sans-serif", text)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)


def figure_block(figure: Figure, key: str, title: str, caption: str) -> str:
    """Return a figure with its accessible name and the sentences under it."""
    svg = svg_text(figure, key).replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def section_block(key: str, title: str, body: str, long: bool = False) -> str:
    """Return a titled section that the table of contents can link to."""
    kind = ' class="long"' if long else ""
    return f'<section id="{key}"{kind} aria-labelledby="{key}-h"><h2 id="{key}-h">{escape(title)}</h2>{body}</section>'


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table with column headers, the first cell of each row being the row's header."""
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Return escaped text as a paragraph, with a CSS class if given."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def flatten(tree: Mapping[str, Any], head: str = "") -> dict[str, str]:
    """Return nested mappings and lists as dotted key -> text; objects of a list go by their class, others by place."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{head}{key}"
        if isinstance(value, list):
            value = _by_name(cast("list[Any]", value))
        if isinstance(value, dict) and value:
            flat |= flatten(cast("dict[str, Any]", value), f"{name}.")
        else:
            flat[name] = "" if value is None else str(value)
    return flat


def _by_name(items: list[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for place, item in enumerate(items):
        path = item.get("class_path") if isinstance(item, dict) else None
        name = str(path).rpartition(".")[2] if path else str(place)
        named[name if name not in named else f"{name}.{place}"] = item
    return named


def page(title: str, header: str, main: str, footer: str) -> str:
    """Return the whole document. The policy forbids every load, so the page cannot reach a network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n"
        f"<body><header>{header}</header>\n<main>{main}</main>\n<footer>{footer}</footer></body></html>\n"
    )
