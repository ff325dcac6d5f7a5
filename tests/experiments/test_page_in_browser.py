"""The report in a real browser: nothing is wider than the screen, and every picture is there."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparseout.experiments.commands import app

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--allow-file-access-from-files"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

# Shows the page in a frame of a given width and leaves what it finds in the title.
FRAME = """<!doctype html><title>waiting</title><iframe src="report.html" width="%d" height="3000"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const size = part => part.getBoundingClientRect();
  document.title = JSON.stringify({
    width: page.documentElement.scrollWidth,
    images: [...page.images].map(image => image.naturalWidth),
    plots: [...page.querySelectorAll("svg.plot")].map(plot => Math.min(size(plot).width, size(plot).height)),
    clipped: [...page.querySelectorAll("svg.plot text")].filter(text => {
      const box = size(text), plot = size(text.closest("svg"));
      return box.left < plot.left - 1 || box.right > plot.right + 1 || box.bottom > plot.bottom + 1;
    }).map(text => text.textContent),
  });
};</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--epochs", "1", "--seeds", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: the report was not looked at in a browser")
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_report_fits_the_screen(folder: Path, tmp_path: Path, width: int):
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME % width)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found["width"] <= width
    assert len(found["images"]) >= 10
    assert all(found["images"])
    assert len(found["plots"]) == 3
    assert min(found["plots"]) > 100
    assert found["clipped"] == []
