"""The report in a real browser: nothing is wider than the screen, and every picture is there."""

import pytest
from browser import CHROMIUM, browser
from sparseout_experiments.commands import app
from typer.testing import CliRunner

FOUND = """(() => {
  const size = part => part.getBoundingClientRect();
  return {
    width: document.documentElement.scrollWidth,
    images: [...document.images].map(image => image.naturalWidth),
    plots: [...document.querySelectorAll("svg.plot")].map(plot => Math.min(size(plot).width, size(plot).height)),
    clipped: [...document.querySelectorAll("svg.plot text")].filter(text => {
      const box = size(text), plot = size(text.closest("svg"));
      return box.left < plot.left - 1 || box.right > plot.right + 1 || box.bottom > plot.bottom + 1;
    }).map(text => text.textContent),
  };
})()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--epochs", "1", "--seeds", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: the report was not looked at in a browser")
def test_the_report_fits_the_screen(folder, tmp_path):
    with browser(tmp_path) as tab:
        for width in (360, 800, 1400):
            tab.open((folder / "report.html").as_uri(), width)
            found = tab.evaluate(FOUND)
            assert found["width"] <= width
            assert len(found["images"]) >= 10
            assert all(found["images"])
            assert len(found["plots"]) == 3
            assert min(found["plots"]) > 100
            assert found["clipped"] == []
            assert tab.complaints == []
