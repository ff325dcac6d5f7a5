"""Every page: its Python runs and prints what is shown, its commands exist, its pictures name what draws them."""

import math
import os
import re
import shlex
from pathlib import Path

import pytest
import typer
from forked import Forks
from sparseout_experiments.commands import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if path.resolve() == path
}
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {name: FENCED.findall(text) for name, text in PAGES.items()}
SLOW = (
    "README.md",
    "docs/tutorial.md",
    "docs/theory.md",
    *(f"docs/how-to/{name}.md" for name in ("convert", "deploy", "target")),
)
EXACT = ("docs/theory.md",)  # nothing is trained, so that every digit is the same
ELSEWHERE = ("docs/how-to/frameworks.md",)  # run by test_readme.py, which reads what is logged
WITH_CODE = [
    name
    for name, blocks in BLOCKS.items()
    if any(language == "python" for language, _ in blocks) and name not in ELSEWHERE
]

# Says where the output of each block begins.
MARK = "--- the next block ---"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w.]*\w)")
KNOB = re.compile(r"(?<=\bq = )\d\.\d+")  # wanders by a tenth where a sparsity does by a hundredth


def test_pages_are_found():
    assert {"README.md", "docs/index.md", "docs/tutorial.md", "docs/how-to/convert.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("name", PAGES)
def test_no_block_is_overlooked(name):
    """Fences stand at the beginning of a line, and Python is called python."""
    assert len(re.findall(r"^\s*(?:```|~~~)", PAGES[name], re.MULTILINE)) == 2 * len(BLOCKS[name])
    assert {language for language, _ in BLOCKS[name]} <= {"", "python", "bibtex", "toml", "sh"}


@pytest.fixture(scope="module")
def forks():
    forks = Forks(os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}/tests", "OMP_NUM_THREADS": "1"})
    yield forks
    forks.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in WITH_CODE]
)
def test_python_runs_and_prints_what_is_shown(name, tmp_path, forks):
    """The blocks of a page are one program. A block without a language that follows one is what that one prints."""
    program, shown = "", []
    for language, text in BLOCKS[name]:
        if language == "python":
            program += f"print({MARK!r})\n{text}"
            shown.append("")
        elif not language and shown and not shown[-1] and not command_lines(text):
            shown[-1] = text
    done = forks.run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split(MARK + "\n")[1:]
    assert len(printed) == len(shown)
    for expected, found in zip(shown, printed, strict=True):
        if expected:
            assert_alike(expected, found)
            assert name not in EXACT or expected == found


def assert_alike(shown, printed):
    """The same words line by line; numbers may differ as those of two processors do after some training."""
    assert len(shown.rstrip().split("\n")) == len(printed.rstrip().split("\n")), printed
    for line, other in zip(shown.rstrip().split("\n"), printed.rstrip().split("\n"), strict=True):
        assert NUMBER.sub("#", line).split() == NUMBER.sub("#", other).split()
        for one, two in zip(KNOB.findall(line), KNOB.findall(other), strict=True):
            assert math.isclose(float(one), float(two), abs_tol=0.15), (line, other)
        line, other = KNOB.sub("q", line), KNOB.sub("q", other)
        for one, two in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
            near = 5 if "." not in one else 0.02 if len(one.split(".")[1]) < 4 else 0.001
            assert math.isclose(float(one), float(two), rel_tol=0.04, abs_tol=near), (line, other)


def test_numbers_that_differ_are_seen():
    assert_alike("Hoyer 0.430, dead 16", "Hoyer  0.431, dead 17")
    assert_alike("q = 1.34, hoyer 0.65", "q = 1.42, hoyer 0.65")
    assert_alike("strength = 9.29e-05, target 0.2", "strength = 0.000116, target 0.2")
    with pytest.raises(AssertionError):
        assert_alike("q = 1.34, hoyer 0.65", "q = 1.52, hoyer 0.65")
    for wrong in ("Hoyer 0.46, dead 16", "Hoyer 0.43, dead 25", "Gini 0.43, dead 16", "Hoyer 0.43, dead 16\nmore"):
        with pytest.raises(AssertionError):
            assert_alike("Hoyer 0.43, dead 16", wrong)


def command_lines(text):
    """The commands of a block, one a line; `\\` at the end of a line goes on."""
    lines = re.sub(r"\\\n\s*", " ", text).split("\n")
    return [line for line in lines if re.match(r"(\w+=\S+ )?(make|sparseout|python|pip|torchrun|accelerate) ", line)]


def commands(text):
    """Every command of ours on a page, in blocks and in the text."""
    found = [line for language, block in FENCED.findall(text) if language != "python" for line in command_lines(block)]
    found += re.findall(r"`([^`]+)`", FENCED.sub("", text))
    found = [re.sub(r"^(torchrun|accelerate) .*?(?=sparseout )", "", " ".join(one.split())) for one in found]
    return [re.split(r"\s#", one)[0].strip() for one in found if re.match(r"(make|sparseout) [a-zA-Z-]", one)]


def what_is_wrong(command):
    """None if a command could be typed; placeholders are `...`, alternatives a|b and words in capitals."""
    program, *words = shlex.split(command)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words if "=" not in word]
        absent = [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
        given = dict(word.split("=", 1) for word in words if "=" in word)
        absent += [name for name in given if not re.search(rf"^{name} \?=", makefile, re.MULTILINE)]
        if not absent and given.get("ARGS"):
            return what_is_wrong(f"sparseout {targets[0]} {given['ARGS']}")
        return f"make does not know {absent}" if absent else None
    here, options = typer.main.get_command(app), []
    for word in words:
        choices = {"TASK": "autoencoder"}.get(word, word).split("|")
        if word == "...":
            continue
        if hasattr(here, "commands") and not word.startswith("-"):
            if absent := [choice for choice in choices if choice not in here.commands]:
                return f"there is no command {absent}"
            here = here.commands[choices[0]]
        elif word.startswith("--"):
            options.append(word.split("=")[0])
    known = {name for param in here.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
    return f"{here.name} has no {sorted(set(options) - known)}" if set(options) - known else None


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name):
    assert {command: wrong for command in commands(PAGES[name]) if (wrong := what_is_wrong(command))} == {}


def test_wrong_commands_are_seen():
    assert len(commands(PAGES["docs/experiments.md"])) > 10
    for right in ("make demo", 'make bench ARGS="--quick"', "sparseout run image --q 1.5", "sparseout demo"):
        assert what_is_wrong(right) is None
    for wrong in (
        "make coffee",
        'make bench ARGS="--slow"',
        "make demo NOISE=1",
        "sparseout walk",
        "sparseout run imag",
    ):
        assert what_is_wrong(wrong)
    assert what_is_wrong("sparseout run image --exponent 1.5")


PICTURES = [
    (name, picture, re.sub("<!--.*?-->", "", text[at.end() :]).lstrip().split("\n\n")[0])
    for name, text in PAGES.items()
    for at in re.finditer(r"!\[[^\]]*\]\(([^)]+)\)", FENCED.sub("", text))
    for picture, text in [(at[1], FENCED.sub("", text))]
]


def test_pictures_are_found():
    assert len(PICTURES) >= 8


@pytest.mark.parametrize(("name", "picture", "below"), PICTURES, ids=[f"{n}:{p}" for n, p, _ in PICTURES])
def test_the_paragraph_below_a_picture_names_the_command_that_draws_it(name, picture, below):
    assert (ROOT / name).parent.joinpath(picture).is_file()
    assert any(what_is_wrong(command) is None for command in commands(below)), below


@pytest.mark.parametrize("name", PAGES)
def test_local_links_exist(name):
    """Also where git shows the pages, which does not follow the link docs/benchmarks; but for one of the site alone."""
    for link in set(re.findall(r"\]\((?!https?:|#)([^)#\s]+)", FENCED.sub("", PAGES[name]))) - {"sweep-digits.html"}:
        target = Path(os.path.normpath((ROOT / name).parent / link))
        assert target.exists(), link
        assert target.resolve() == target, link
