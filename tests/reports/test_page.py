"""The page: complete, self-contained, small, and safe with any name a run may contain."""

import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from evolute.__main__ import main
from evolute.reports import load_run, print_summary, write_report
from evolute.reports.spec import SECTIONS
from tests.reports.synthetic import LAYERS, OF_OTHER_TASKS, write_run

EVIL = "<script>alert('x')</script>&\"$x_1$"


class Page(HTMLParser):
    """Collects tags, attributes and ids, and complains about tags left open."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "small", steps=40, layers=LAYERS[:4])


@pytest.fixture(scope="module")
def text(folder):
    return write_report([folder], folder / "report.html").read_text()


def test_every_recorded_figure_is_on_the_page(text):
    page = Page(text)
    assert page.tags.count("svg") == len(SECTIONS) - len(OF_OTHER_TASKS) - 1  # directional curvature was not recorded
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg")
    labels = {value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")}
    assert {"Loss", "Learning rate used by each layer", "Sharpness against its threshold"} <= labels
    assert all(section.good in page.text for section in SECTIONS if not section.optional)


def test_page_is_small_and_loads_nothing(text):
    assert len(text.encode()) < 3_000_000
    addresses = set(re.findall(r"https?://[^\"' <>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    loaded = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "data")]
    assert loaded
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    assert "default-src 'none'" in text


def test_ids_are_unique_and_every_link_leads_somewhere(text):
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href") and value.startswith("#")]
    assert {link[1:] for link in links} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_header_configuration_environment_and_samples(text):
    shown = Page(text).text
    for part in ("43.1% below the bigram floor, 3.412", "max_steps: 1000", "versions.torch", "2.13.0", "return 1000"):
        assert part in shown
    assert "evolute fit --config llm/pretrain" in shown


def test_a_run_with_only_a_loss_says_why_the_rest_is_missing(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss,noise/time_ms\n0,2\n1,1,3\n")
    page = Page(write_report([tmp_path], tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 2  # loss and time
    assert "curvature/sharpness not recorded. Add CurvatureMonitor() to the callbacks." in page.text
    assert "noise/* not recorded. Add NoiseAdaptiveLR() to the callbacks" in page.text
    assert "step/ghost_ratio not recorded. Add StepRadius() to the callbacks." in page.text
    assert "no config.yaml" in page.text
    assert "no environment.json" in page.text


def test_names_and_texts_of_a_run_are_shown_as_they_are(tmp_path):
    folder = write_run(tmp_path / "<b>run", steps=40, layers=[EVIL, *LAYERS[1:4]])
    (folder / "config.yaml").write_text(f"note: {EVIL}\n")
    (folder / "environment.json").write_text(json.dumps({"command": EVIL, EVIL: "</table>"}))
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": EVIL, "text": "</pre>" + EVIL}))
    text = write_report([folder], tmp_path / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.text.count(EVIL) >= 4
    assert "x_1$" in "".join(re.findall(r"<text[^>]*>([^<]*)</text>", text))  # drawn, not taken for mathematics


def test_nan_losses_are_announced(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,2\n1,nan\n2,1\n")
    shown = Page(write_report([tmp_path], tmp_path / "r.html").read_text()).text
    assert "1 non-finite value in train/loss, first at step 1" in shown


def test_two_runs_share_figures_and_show_what_differs(small, tmp_path):
    other = write_run(tmp_path / "other", steps=40, seed=3, speed=0.5, layers=LAYERS[:4])
    page = Page(write_report([small, other], tmp_path / "both.html").read_text())
    assert page.tags.count("svg") == len(SECTIONS) - len(OF_OTHER_TASKS) - 1
    differing = page.text.split("Settings that are not equal")[1].split("Loss")[0]
    assert "seed_everything" in differing
    assert "model.lr" in differing
    assert "max_steps" not in differing
    assert "validation, other" in page.text


def test_ten_thousand_steps_stay_under_three_megabytes(tmp_path):
    page = write_report(
        [write_run(tmp_path / "long", steps=10_000, every=50, layers=LAYERS[:20])], tmp_path / "report.html"
    )
    assert page.stat().st_size < 3_000_000


def test_same_run_same_page(small, tmp_path):
    first, second = (write_report([small], tmp_path / name).read_text() for name in ("a.html", "b.html"))
    assert first == second


def test_summary_names_the_page(folder, text):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(load_run(folder), console=console)
    printed = console.export_text()
    assert "1.941" in printed
    assert f"Report: {folder / 'report.html'}" in printed.replace("\n", "")


def test_command_writes_page_and_figures(tmp_path, capsys):
    small = tmp_path / "run"
    small.mkdir()
    (small / "metrics.csv").write_text("step,train/loss,noise/w,noise/time_ms\n0,2,1,3\n1,1,1,3\n")
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(small), "--out", str(out), "--figures", str(tmp_path / "figures")]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert (tmp_path / "figures" / "time.svg").is_file()
    assert "page.html" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["missing", "empty", "file"])
def test_command_refuses_what_is_no_run_in_one_line(tmp_path, capsys, case):
    target = tmp_path / case
    if case == "empty":
        target.mkdir()
    elif case == "file":
        target.write_text("x")
    assert main(["report", str(target)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("evolute: error: ")
    assert captured.err.count("\n") == 1
    assert str(target) in captured.err
    assert not list(tmp_path.rglob("*.html"))
