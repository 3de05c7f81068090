"""The page in a real browser: it draws, and asks the network for nothing."""

import os
import re
import shutil
import subprocess

import pytest

from evolute.reports.page import write_report
from tests.reports.synthetic import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Without the background-networking flags Chromium itself looks up hosts at every start.
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def test_the_page_is_drawn_and_loads_nothing(tmp_path):
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI installs chromium, and it is not here")
        pytest.skip("no chromium on this machine")
    page = write_report([write_run(tmp_path / "run", steps=200)], tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000",
         "--enable-logging=stderr", "--log-level=0", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Refused to" not in done.stderr  # the page's own content policy forbids every load
    assert not re.search(r"CONSOLE.*(Error|Uncaught)", done.stderr)
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (1200, 3000)
        # An empty page has one colour; figures in a band of the page have many.
        bands = [
            image.crop((0, top, 1200, top + 600)).convert("RGB").getcolors(maxcolors=1 << 20) for top in (0, 1200, 2400)
        ]
    assert all(band is not None and len(band) > 50 for band in bands)
