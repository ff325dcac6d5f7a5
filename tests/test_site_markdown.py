"""What the site's Markdown makes of mathematics, docstrings and links."""

import importlib.util
from pathlib import Path

import pytest
from markdown import markdown

SOURCE = Path(__file__).resolve().parent.parent / "tools/site_markdown.py"


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("site_markdown", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extensions = [module.makeExtension(), "pymdownx.superfences"]
    return lambda text: markdown(text, extensions=extensions)


@pytest.mark.parametrize(
    "text", ["It is $|x|^q$ here.", "It is :math:`|x|^q` here.", "It is $|x|\n^q$ here.", r"It is `$`, $|x|^q$ and \$."]
)
def test_mathematics_in_a_line(render, text):
    html = render(text)
    assert html.count("<math") == 1
    assert "<msup>" in html
    assert 'display="block"' not in html
    assert "$|" not in html


@pytest.mark.parametrize(
    "text",
    ["$$\na^q\n$$", "$$a^q$$", "$$ a^q\n$$", ".. math:: a^q", ".. math::\n    a^q", ".. math::\n\n    a^q\n"],
)
def test_a_display_and_what_comes_after_it(render, text):
    html = render(f"Before\n\n{text}\n\nAfter :func:`sparseout.backend`.")
    assert html.count('<math display="block"><msup>') == 1
    assert "$$" not in html
    assert "math::" not in html
    assert html.index("Before") < html.index("<msup>") < html.index("After")
    assert ":func:" not in html


def test_a_display_of_several_parts_can_wrap(render):
    html = render(r"$$ a = b, \qquad c = d $$")
    assert html.count('<math display="block">') == 2
    assert html.count('<div class="display">') == 1
    assert render(r"$$ \mathrm{if \qquad so} $$").count('<math display="block">') == 1


def test_latex_is_not_read_as_markdown(render):
    html = render(r"The set $\{a_1 * b_1\}$ and $\{a_2 * b_2\}$.")
    assert html.count("<math") == html.count("{") == 2
    assert html.count("<msub>") == 4
    assert "<em>" not in html


def test_a_display_in_a_list_stays_in_it(render):
    html = render("- one\n\n    $$\n    a^q\n    $$\n\n- two")
    assert html.count("<ul>") == 1
    assert html.index("<msup>") < html.index("two") < html.index("</ul>")


@pytest.mark.parametrize("text", ["costs $5 and $6", r"`$x$`", "```\n$x$\n:math:`x`\n>>> 1\n```"])
def test_what_is_no_mathematics_stays(render, text):
    assert "<math" not in render(text)


def test_primes_stand_beside_their_letter(render):
    html = render("$A''(x) + y^2$")
    assert '<mi>A</mi><mo lspace="0" rspace="0">\u2033</mo>' in html
    assert html.count("<msup>") == 1  # the square


def test_unknown_latex_is_an_error(render):
    with pytest.raises(Exception, match="frog"):
        render(r"$\frog$")


def test_examples_are_code_until_an_empty_line(render):
    html = render("Text\n\n>>> 1 < 2\nTrue\n\nMore *text*.")
    assert "blockquote" not in html
    assert "<em>text</em>" in html
    assert html.index("True") < html.index("</code>") < html.index("More")


def test_names(render):
    html = render(":class:`Sparseout`, :func:`sparseout.backend`, :class:`torch.nn.Dropout` and :meth:`report`")
    assert "[<code>Sparseout</code>][sparseout.Sparseout]" in html  # for mkdocs-autorefs
    assert "[<code>sparseout.backend</code>][sparseout.backend]" in html
    assert ", <code>torch.nn.Dropout</code> and <code>report</code>" in html


def test_links_and_pictures(render):
    assert '<a href="images/a.png"><img' in render("![a](images/a.png) and more")
    assert render("[![a](a.png)](b.md)").count("<a ") == 1
    assert 'href="../benchmarks/bench.md"' in render("[it](../../benchmarks/results/bench.md)")
