"""The site: it builds without a warning, is complete, and looks right in a browser with nothing from elsewhere."""

import ast
import functools
import http.server
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browser import CHROMIUM, browser

import sparseout

ROOT = Path(__file__).resolve().parent.parent
SWEEP = "how-to/sweep-digits.html"  # made by `sparseout report`, whose page has tests of its own


def build(to, config=ROOT / "mkdocs.yml"):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(to)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools"), "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Page(HTMLParser):
    """What a page points to, and what can be pointed at."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.math, self.code = [], {""}, 0, 0
        self.words = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        self.math += tag == "math"
        self.code += tag in ("code", "script", "style")

    def handle_endtag(self, tag):
        self.code -= tag in ("code", "script", "style")

    def handle_data(self, data):
        if not self.code:
            self.words.append(data)


@pytest.fixture(scope="module")
def pages(site):
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html")) if path != site / SWEEP}


@pytest.mark.slow
def test_every_page_of_docs_is_there(pages):
    sources = {*(ROOT / "docs").rglob("*.md"), ROOT / "docs/benchmarks/bench.md"}
    expected = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in sources}
    assert expected | {"404.html"} == set(pages)


@pytest.mark.slow
def test_the_page_of_a_sweep_is_there(site, pages):
    assert SWEEP.rpartition("/")[2] in pages["how-to/sweep.html"].links
    text = (site / SWEEP).read_text(encoding="utf-8")
    assert "50 runs: 50 finished." in " ".join(text.split())
    assert text.endswith("</html>") or text.endswith("</html>\n")


@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(site, pages):
    seen = 0
    for name, page in pages.items():
        for link in page.links:
            target = urlsplit(urljoin(f"/{name}", link))
            if target.scheme or target.netloc:
                continue
            path = unquote(target.path).lstrip("/") or "index.html"
            assert (site / path).is_file(), (name, link)
            if path in pages and name != "404.html":
                assert unquote(target.fragment) in pages[path].anchors, (name, link)
            seen += 1
    assert seen > 500


@pytest.mark.slow
def test_mathematics_is_drawn_and_none_is_left(pages):
    assert all(pages[name].math for name in ("index.html", "limits.html", "reference/layers.html"))
    for name, page in pages.items():
        assert not re.findall(r"\$|:math:|\.\. math|:class:|:func:|:meth:|\\[a-z]+|>>>", "".join(page.words)), name


@pytest.mark.slow
def test_every_public_name_has_its_place_in_the_reference(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    listed = {line.split()[0] for line in inventory.splitlines()}
    names = {f"sparseout.{name}" for name in sparseout.__all__}
    for name in sparseout.__all__:
        part = getattr(sparseout, name)
        if inspect.ismodule(part):
            names |= {f"{part.__name__}.{inner}" for inner in part.__all__ if not inner.isupper()}
    assert len(names) > 20
    assert names <= listed


@pytest.mark.slow
def test_what_a_function_returns_is_not_taken_for_a_type(site, pages):
    """A colon in the first line of `Returns:` would make a type of what stands before it."""
    found = 0
    for name in pages:
        text = (site / name).read_text(encoding="utf-8")
        for part in re.findall(r"(?:Returns|Raises|Yields):</span>.*?</ul>", text, re.DOTALL):
            for kind in re.findall(r"<li class=\"doc-section-item[^>]*>\s*<code>(.*?)</code>", part, re.DOTALL):
                ast.parse(re.sub(r"<[^>]*>|&[a-z]+;", "", kind), mode="eval")
                found += 1
    assert found > 20


def build_of_one_page(folder, text):
    """Whether a site of a page with this text is built, under the configuration of the whole."""
    (folder / "docs").mkdir()
    (folder / "docs/index.md").write_text(f"# Home\n\n{text}\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = re.sub(r"\nnav:\n.*?\n(?=\w)", "\n", config, flags=re.DOTALL).replace("[src]", f"[{ROOT}/src]")
    (folder / "mkdocs.yml").write_text(re.sub(r"(extra_css|hooks): \[.*\]\n", "", config))
    return build(folder / "site", folder / "mkdocs.yml").returncode == 0


@pytest.mark.slow
def test_a_page_that_is_whole_is_built(tmp_path):
    assert build_of_one_page(tmp_path, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    ["[gone](gone.md)", "[gone](index.md#gone)", "$\\frog$", "::: sparseout.gone", '--8<-- "gone.md"'],
)
def test_what_is_broken_stops_the_build(tmp_path, broken):
    assert not build_of_one_page(tmp_path, broken)


# --- in a browser ------------------------------------------------------------------------------------------------

FOUND = """(() => {
  const size = part => part.getBoundingClientRect();
  return {
    width: document.documentElement.scrollWidth,
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    tiny: [...document.images].filter(image => size(image).width < 300).map(image => image.src),
    cut: [...document.querySelectorAll(".display, .md-content p")]
      .filter(box => box.scrollWidth > box.clientWidth + 8).map(box => box.textContent || box.innerHTML),
    empty: [...document.querySelectorAll("math")].filter(one => !(size(one).width > 3 && size(one).height > 3)).length,
    flat: [...document.querySelectorAll("mfrac")].filter(
      one => size(one.children[0]).bottom > size(one.children[1]).top + 2).length,
    ground: getComputedStyle(document.body).backgroundColor,
  };
})()"""
SEARCH = """new Promise(found => {
  document.querySelector("[for=__search]").click();
  const field = document.querySelector("[data-md-component=search-query]");
  field.focus();
  field.value = "limits";
  field.dispatchEvent(new Event("keyup", {bubbles: true}));
  const look = () => {
    const hits = [...document.querySelectorAll(".md-search-result__link")].map(link => link.textContent);
    hits.length ? found(hits) : setTimeout(look, 50);
  };
  look();
})"""


@pytest.fixture(scope="module")
def host(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: the site was not looked at")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_in_a_browser(pages, host, tab, width, scheme):
    wrong = {}
    for name in set(pages) - {"404.html"}:
        tab.open(f"{host}/{name}", width, 900, scheme)
        found = tab.evaluate(FOUND)
        assert (found.pop("ground") == "rgb(255, 255, 255)") == (scheme == "light"), name
        too_wide = max(0, found.pop("width") - width)
        elsewhere = [url for url in tab.requests if not url.startswith((host, "data:"))]
        bad = {"too wide": too_wide, "elsewhere": elsewhere, "complaints": tab.complaints, **found}
        if any(bad.values()):
            wrong[name] = bad
    assert wrong == {}, json.dumps(wrong, indent=1)


@pytest.mark.slow
@needs_chromium
def test_mathematics_has_the_font_of_the_site(host, tab):
    tab.open(f"{host}/limits.html")
    assert tab.evaluate("document.fonts.load('16px \"Sparseout Math\"').then(found => found.length)") == 1
    assert any(url.endswith("fonts/math.ttf") for url in tab.requests)
    assert tab.evaluate("getComputedStyle(document.querySelector('math')).fontFamily").startswith('"Sparseout Math"')


@pytest.mark.slow
@needs_chromium
def test_search_finds(host, tab):
    tab.open(f"{host}/index.html")
    assert "Limits" in tab.evaluate(SEARCH)[0]  # a page's title counts most, whatever the other pages say
    assert tab.complaints == []
    assert all(url.startswith((host, "data:", "blob:")) for url in tab.requests)


FAULTY = """<!doctype html><meta name="viewport" content="width=device-width"><body style="margin: 0">
<div style="width: 500px">wide</div>
<div class="display" style="overflow: auto"><div style="width: 999px">cut</div></div>
<img src="gone.png"><math></math>
<script src="https://elsewhere.invalid/script.js"></script><script>throw new Error("fault")</script>"""


@pytest.mark.slow
@needs_chromium
def test_a_page_with_faults_is_seen(tmp_path, tab):
    (tmp_path / "page.html").write_text(FAULTY)
    tab.open((tmp_path / "page.html").as_uri(), 390)
    found = tab.evaluate(FOUND)
    assert found["width"] >= 500
    assert found["cut"] == ["cut"]
    assert found["broken"]
    assert found["empty"] == 1
    assert "https://elsewhere.invalid/script.js" in tab.requests
    assert any("fault" in text for text in tab.complaints)
    assert any("ERR_" in text for text in tab.complaints)
