import math
import re

import pytest
from sparseout_experiments.demo import Options, Run, Scale, Setting
from sparseout_experiments.demo.summary import Row, caveats, dial, notes, summarise, trend, verdict
from sparseout_experiments.demo.table import lines

WOBBLE = (-0.01, 0.0, 0.01)


def runs(
    scale: Scale,
    hoyer: dict[float, float],
    live: dict[float, float] | None = None,
    wobble: tuple[float, ...] = WOBBLE,
    error: float = 0.01,
    undefined: int = 0,
) -> list[Run]:
    return [
        run(Setting("sparseout", scale, q), seed, value + off, (live or hoyer)[q] + off, error, undefined)
        for q, value in hoyer.items()
        for seed, off in enumerate(wobble)
    ]


def run(setting: Setting, seed: int, hoyer: float, live: float, error: float = 0.01, undefined: int = 0) -> Run:
    return Run(setting, seed, hoyer, live, 0.5, 0.3, 0.25, 450, undefined, error, 1.0, [1] * 60)


def rows_of(found: list[Run], *scales: Scale, q: tuple[float, ...] = (1.0, 2.0, 3.0)) -> list[Row]:
    return summarise(Options(q=q, scales=scales or ("paper",)), found)


BLIND = 0.07  # the error of answering with the average digit

FALLING = {1.0: 0.9, 2.0: 0.6, 3.0: 0.4}
OVERLAPPING = {1.0: 0.62, 2.0: 0.60, 3.0: 0.58}
FLAT = {1.0: 0.60, 2.0: 0.61, 3.0: 0.60}
RISING = {1.0: 0.4, 2.0: 0.6, 3.0: 0.9}


@pytest.mark.parametrize(
    ("hoyer", "wobble", "says"),
    [
        (FALLING, WOBBLE, "falls at every step, no two of its 95% intervals overlapping: 0.90 to 0.40"),
        (OVERLAPPING, WOBBLE, "falls overall"),
        (RISING, WOBBLE, "rises overall"),
        (FALLING, (0.0,), "fewer than two seeds finished every q, so its slope has no interval): 0.90 to 0.40"),
    ],
)
def test_says_what_the_numbers_say(hoyer: dict[float, float], wobble: tuple[float, ...], says: str) -> None:
    assert says in verdict(rows_of(runs("paper", hoyer, wobble=wobble)), ["paper"])


def test_no_direction_where_the_slope_could_be_0() -> None:
    found = [
        run(Setting("sparseout", "paper", q), seed, value, value)
        for seed, curve in enumerate([(0.5, 0.6, 0.7), (0.7, 0.6, 0.5), (0.6, 0.6, 0.6)])
        for q, value in zip((1.0, 2.0, 3.0), curve, strict=True)
    ]
    rows = rows_of(found)
    assert "has no clear direction" in verdict(rows, ["paper"])
    slope = trend(dial(rows, "paper"), "hoyer").slope
    assert slope.low < 0 < slope.high


def test_the_same_curve_in_every_seed_is_flat_only_if_it_is() -> None:
    flat = dict.fromkeys((1.0, 2.0, 3.0), 0.5)
    assert "has no clear direction" in verdict(rows_of(runs("paper", flat, wobble=(0, 0, 0))), ["paper"])


def test_live_units_that_disagree_are_not_hidden() -> None:
    sentence = verdict(rows_of(runs("paper", FALLING, live=RISING)), ["paper"])
    assert "falls at every step" in sentence
    assert "(0.40 to 0.90 over live units, rising)" in sentence


def test_two_scales_share_a_clause_only_where_they_agree() -> None:
    agree = rows_of(runs("paper", FALLING) + runs("matched", FALLING), "paper", "matched")
    assert verdict(agree, ["paper", "matched"]).count("falls") == 1
    differ = rows_of(runs("paper", FALLING) + runs("matched", RISING), "paper", "matched")
    sentence = verdict(differ, ["paper", "matched"])
    assert re.search("falls at every step.* at the paper's scale.*; it rises overall.* at matched", sentence)
    assert sentence.count(".") - len(re.findall(r"\d\.\d", sentence)) == 1  # one sentence


def test_one_q_is_nothing_to_compare() -> None:
    assert "Only one q was given" in verdict(rows_of(runs("paper", {2.0: 0.6}), q=(2.0,)), ["paper"])


def test_a_q_whose_codes_are_all_zero_is_left_out_of_the_verdict() -> None:
    hoyer = {1.0: math.nan, 2.0: 0.6, 3.0: 0.4}
    assert verdict(rows_of(runs("paper", hoyer)), ["paper"]).startswith("As q goes from 2 to 3,")


def test_the_seeds_of_an_interrupted_run_need_not_be_whole() -> None:
    found = runs("paper", FALLING)[:-1]  # q = 3 lacks its last seed
    rows = rows_of(found)
    assert [len(row.runs) for row in rows] == [3, 3, 2]
    assert trend(dial(rows, "paper"), "hoyer").slope.n == 2


def test_undefined_rows_and_diverged_runs_are_said() -> None:
    assert not caveats(rows_of(runs("paper", FALLING)), BLIND)
    (said,) = caveats(rows_of(runs("paper", FALLING, undefined=4)), BLIND)
    assert "q = 1 at the paper's scale: 12 of 1350" in said
    said = " ".join(caveats(rows_of(runs("paper", FALLING, error=math.nan)), BLIND))
    assert "diverged" in said
    assert "3 of 3" in said


def test_collapse_is_said() -> None:
    (said,) = caveats(rows_of([*runs("paper", {1.0: 0.9}, error=0.068), *runs("paper", {2.0: 0.6, 3.0: 0.4})]), BLIND)
    assert said.startswith("Collapsed:")
    assert "(q = 1 at the paper's scale)" in said


def test_an_undefined_interval_is_a_dash() -> None:
    rows = rows_of(runs("paper", FALLING, wobble=(0.0,)))
    assert lines(rows)[0].cells[0] == ("0.900", "-")
    assert '"-"' in caveats(rows, BLIND)[0]


@pytest.mark.parametrize("seeds", [2, 3])
def test_notes_are_claimed_only_where_they_hold(seeds: int) -> None:
    none = [run(Setting("none"), seed, 0.3, 0.3, error=0.001) for seed in range(seeds)]
    dropout = [run(Setting("dropout"), seed, 0.6 + off, 0.6) for seed, off in enumerate(WOBBLE)]
    options = Options(q=(1.0, 2.0, 3.0), scales=("paper",))
    said = " ".join(notes(options, rows_of(runs("paper", FALLING) + none + dropout)))
    assert "25% at q = 1 and 25% at q = 3 at the paper's scale" in said
    assert "sparser than the one without (0.30)" in said
    assert "reconstructs best" in said
    assert "agree to the last bit" in said

    none = [run(Setting("none"), 0, 0.5, 0.5, error=0.02)]
    dropout = [run(Setting("dropout"), seed, 0.6001, 0.6) for seed in range(3)]
    said = " ".join(notes(options, rows_of(runs("paper", FALLING) + none + dropout)))
    assert "sparser than the one without" not in said
    assert "reconstructs best" not in said
    assert "agree to the last bit" not in said
