"""Pages by template: numbers filled in, prose wrapped."""

import math
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.statistics import Interval


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"study_of_{tmp_path.name}"  # of each test: the templates of a package are compiled once
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return name


def rendered(package: str, tmp_path: Path, template: str, **values: object) -> str:
    (tmp_path / package / "page.md.j2").write_text(template)
    return pages.rendered(package, "page.md.j2", **values)


def test_numbers_are_filled_in_and_undefined_ones_are_dashes(package: str, tmp_path: Path) -> None:
    template = """\
{{ x | fixed(2) }} {{ x | fixed(1, signed=True) }} {{ x | percent(1) }} {{ i | interval(2) }}
{{ i | percent(1, signed=True) }} {{ qs | listed }} {{ none | fixed(2) }} {{ nan | fixed(2) }} {{ nan | percent }}
{{ lone | interval(1) }} {{ empty | interval(1, signed=True) }} {{ empty | percent }}
"""
    found = rendered(
        package,
        tmp_path,
        template,
        x=0.456,
        i=Interval(0.5, 0.25, 3),
        qs=(0.5, 1.0),
        none=None,
        nan=math.nan,
        lone=Interval(2.0, math.nan, 1),
        empty=Interval(math.nan, math.nan, 0),
    )
    numbers = "0.46 +0.5 45.6% 0.50 ± 0.25 +50.0% ± 25.0% 0.5, 1 - - - 2.0 - -"
    assert " ".join(found.split()) == numbers


def test_a_name_without_a_value_is_an_error(package: str, tmp_path: Path) -> None:
    with pytest.raises(UndefinedError, match="'verdict' is undefined"):
        rendered(package, tmp_path, "It is {{ verdict }}.")


def test_text_from_elsewhere_stays_in_its_cell(package: str, tmp_path: Path) -> None:
    found = rendered(package, tmp_path, "| {{ reason | cell }} |", reason="a | b\n<script>\n\n# no")
    assert found == "| a \\| b &lt;script> # no |\n"


def test_prose_is_wrapped_and_nothing_else() -> None:
    long = " ".join(["well-known"] * 30)
    text = f"# {long}\nprose\n{long}\n\n\n\n- {long}\n- two\n  lines\n| {long} |\n| b |\n![{long}](x.png)\nend\n"
    lines = pages.wrapped(text).splitlines()
    whole = [f"# {long}", f"| {long} |", "| b |", f"![{long}](x.png)", "- two lines", "end"]
    assert [line for line in lines if line in whole] == [whole[0], whole[4], *whole[1:4], whole[5]]
    prose = [line for line in lines if line not in whole]
    assert prose[0].startswith("prose well-known")
    assert max(map(len, prose)) <= 120
    assert not any(line.endswith("-") for line in prose)
    bullet = prose.index("- " + " ".join(["well-known"] * 10))
    assert prose[bullet - 1] == ""
    assert prose[bullet - 2] != ""
    assert prose[bullet + 1].startswith("  well-known")
