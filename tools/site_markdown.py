r"""What the site's Markdown has beyond the usual: mathematics as MathML, and what docstrings hold.

A plain extension of Python-Markdown, and so for any builder that uses it. It knows:

- `$x$` in a line and `$$` at the beginning and end of lines, around LaTeX;
- Sphinx's :math:`x` and `.. math::`, in which docstrings are written, since `help()` shows them well;
- Sphinx's :class:`name` and :func:`name`: links to names of `sparseout`; :meth:`name` and torch's are code;
- examples that begin with `>>>`, as far as the next empty line: a block of code;
- pictures, which link to themselves, and links to `benchmarks/results`, which are right where git shows the pages.

Mathematics becomes MathML while the site is built: browsers draw it without a script or a font from elsewhere.
"""

import re
from collections import deque
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from markdown.treeprocessors import Treeprocessor
from math_core import LatexToMathML

FENCE = re.compile(r"\s*(`{3,}|~{3,})")
DIRECTIVE = re.compile(r"\s*\.\. math::\s*(.*)")
ROLE = re.compile(r":(class|func|meth):`([\w.]+)`")
MATHML = LatexToMathML(fancy_error=False)  # raises LatexError for what it does not know, and the build stops
PRIMED = re.compile("<msup>(<mi>[^<]*</mi>)<mo>([\u2032-\u2034\u2057])</mo></msup>")


def _drawn(latex: str, displaystyle: bool) -> str:
    """LaTeX as MathML. Primes stand beside their letter: fonts have them raised, and as superscripts they vanish."""
    drawn: str = MATHML.convert_with_local_state(latex, displaystyle=displaystyle)
    return PRIMED.sub(r'<mrow>\1<mo lspace="0" rspace="0">\2</mo></mrow>', drawn)


class _Blocks(Preprocessor):
    """Displays, examples and links, line by line; what stands between fences stays."""

    def run(self, lines: list[str]) -> list[str]:
        done: list[str] = []
        rest = deque(lines)
        fence = ""
        while rest:
            line = rest.popleft()
            indent = line[: len(line) - len(line.lstrip())]
            mark = FENCE.match(line)
            if fence or mark:
                if mark and (not fence or mark[1].startswith(fence)):
                    fence = "" if fence else mark[1]
                done.append(line)
            elif line.lstrip().startswith("$$"):
                text = line.strip()[2:]
                while not text.endswith("$$"):
                    text = f"{text} {rest.popleft().strip()}"
                done += self._display(text[:-2], indent)
            elif found := DIRECTIVE.fullmatch(line):
                text = found[1]
                while rest and (not rest[0].strip() or rest[0].startswith(f"{indent} ")):
                    text = f"{text} {rest.popleft().strip()}"
                done += self._display(text, indent)
            elif line.lstrip().startswith(">>>"):
                done += [f"{indent}```pycon", line]
                while rest and rest[0].strip():
                    done.append(rest.popleft())
                done.append(f"{indent}```")
            else:
                done.append(ROLE.sub(_link, line))
        return done

    def _display(self, latex: str, indent: str) -> list[str]:
        parts = latex.split(r"\qquad")  # on a narrow screen each gets a line of its own
        if any(part.count("{") != part.count("}") for part in parts):
            parts = [latex]
        drawn = "".join(_drawn(part, displaystyle=True) for part in parts)
        return ["", indent + self.md.htmlStash.store(f'<div class="display">{drawn}</div>'), ""]


def _link(found: re.Match[str]) -> str:
    role, name = found.groups()
    if role == "meth" or name.startswith("torch."):
        return f"`{name}`"
    return f"[`{name}`][{name if name.startswith('sparseout.') else f'sparseout.{name}'}]"


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(_drawn(m[1], displaystyle=False)), m.start(0), m.end(0)


class _Links(Treeprocessor):
    """Pictures link to themselves, to be had in full size; the results of benchmarks are at docs/benchmarks here."""

    def run(self, root: Element) -> None:
        for link in root.iter("a"):
            link.set("href", link.get("href", "").replace("../benchmarks/results/", "benchmarks/"))
        for parent in root.iter():
            for at, child in enumerate(parent):
                if child.tag == "img" and parent.tag != "a":
                    link = Element("a", href=child.get("src", ""))
                    link.tail, child.tail = child.tail, None
                    link.append(child)
                    parent[at] = link


class _Site(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Blocks(md), "site_blocks", 28)  # before fences are taken out, at 25
        md.inlinePatterns.register(_Inline(r":math:`([^`]+)`", md), "role", 195)  # before code, at 190
        md.treeprocessors.register(_Links(md), "site_links", 5)  # before MkDocs looks at links, at 0
        # After code, and before backslashes escape, at 180.
        md.inlinePatterns.register(_Inline(r"(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?!\w)", md), "dollars", 185)


def makeExtension() -> Extension:
    """What Python-Markdown calls."""
    return _Site()
