import math
import re

import pytest
from demo_results import WOBBLE, dial, results, row
from sparseout_experiments.demo import Scale, report
from sparseout_experiments.demo.summary import caveats, notes, summarise, trend, verdict

BLIND = 70.0  # the error of answering with the average digit

FALLING: dict[float, float | None] = {1.0: 0.9, 2.0: 0.6, 3.0: 0.4}
OVERLAPPING: dict[float, float | None] = {1.0: 0.62, 2.0: 0.60, 3.0: 0.58}
RISING: dict[float, float | None] = {1.0: 0.4, 2.0: 0.6, 3.0: 0.9}


@pytest.mark.parametrize(
    ("hoyer", "wobble", "says"),
    [
        (FALLING, WOBBLE, "falls at every step, no two of its 95% intervals overlapping: 0.90 to 0.40"),
        (OVERLAPPING, WOBBLE, "falls overall"),
        (RISING, WOBBLE, "rises overall"),
        (FALLING, (0.0,), "fewer than two seeds finished every q, so its slope has no interval): 0.90 to 0.40"),
        (dict.fromkeys(FALLING, 0.5), (0.0, 0.0, 0.0), "has no clear direction"),
        ({2.0: 0.6}, WOBBLE, "Only one q was given"),
        ({1.0: None, 2.0: 0.6, 3.0: 0.4}, WOBBLE, "As q goes from 2 to 3,"),  # at 1 all codes are zero
        ({1.0: None, 2.0: None, 3.0: 0.4}, WOBBLE, "Fewer than two values of q have a defined sparsity"),
    ],
)
def test_says_what_the_numbers_say(hoyer: dict[float, float | None], wobble: tuple[float, ...], says: str) -> None:
    assert says in verdict(results(dial("paper", hoyer, wobble=wobble)), ["paper"])


def test_no_direction_where_the_slope_could_be_0() -> None:
    found = results(
        [
            row("sparseout", seed, value, "paper", q)
            for seed, curve in enumerate([(0.5, 0.6, 0.7), (0.7, 0.6, 0.5), (0.6, 0.6, 0.6)])
            for q, value in zip((1.0, 2.0, 3.0), curve, strict=True)
        ]
    )
    assert "has no clear direction" in verdict(found, ["paper"])
    of_all = trend(found, "paper", "hoyer")
    assert of_all
    assert of_all.slope.low < 0 < of_all.slope.high


def test_live_units_that_disagree_are_not_hidden() -> None:
    sentence = verdict(results(dial("paper", FALLING, live=RISING)), ["paper"])
    assert "falls at every step" in sentence
    assert "(0.40 to 0.90 over live units, rising)" in sentence


def test_two_scales_share_a_clause_only_where_they_agree() -> None:
    scales: list[Scale] = ["paper", "matched"]
    agree = results(dial("paper", FALLING) + dial("matched", FALLING))
    assert verdict(agree, scales).count("falls") == 1
    sentence = verdict(results(dial("paper", FALLING) + dial("matched", RISING)), scales)
    assert re.search("falls at every step.* at the paper's scale.*; it rises overall.* at matched", sentence)
    assert sentence.count(".") - len(re.findall(r"\d\.\d", sentence)) == 1  # one sentence


def test_the_seeds_of_an_interrupted_run_need_not_be_whole() -> None:
    rows = dial("paper", FALLING)
    rows[-1] |= dict.fromkeys(("hoyer", "hoyer_live", "metric")) | {"status": "planned"}  # q = 3 lacks its last seed
    found = results(rows)
    assert [row["seeds"] for row in summarise(found)] == [3, 3, 2]
    of_all = trend(found, "paper", "hoyer")
    assert of_all
    assert of_all.slope.n == 2
    never = [row("dropout", 0, None, status="planned")]
    assert len(summarise(results(rows + never))) == 3


def test_undefined_rows_and_diverged_runs_are_said() -> None:
    assert not caveats(summarise(results(dial("paper", FALLING))), BLIND)
    (said,) = caveats(summarise(results(dial("paper", FALLING, undefined=0.01))), BLIND)
    assert "q = 1 at the paper's scale: 1%" in said
    nothing = dict.fromkeys(FALLING)
    said = " ".join(caveats(summarise(results(dial("paper", nothing, status="failed", metric=None))), BLIND))
    assert "diverged" in said
    assert "3 of 3" in said


def test_collapse_is_said() -> None:
    rows = [*dial("paper", {1.0: 0.9}, metric=68.0), *dial("paper", {2.0: 0.6, 3.0: 0.4})]
    (said,) = caveats(summarise(results(rows)), BLIND)
    assert said.startswith("Collapsed:")
    assert "(q = 1 at the paper's scale)" in said


def test_an_undefined_interval_is_a_dash() -> None:
    rows = summarise(results(dial("paper", FALLING, wobble=(0.0,))))
    assert math.isnan(rows[0]["hoyer_half"])
    assert report.cell(rows[0], "hoyer") == ("0.900", "-")
    assert '"-"' in caveats(rows, BLIND)[0]


@pytest.mark.parametrize("seeds", [2, 3])
def test_notes_are_claimed_only_where_they_hold(seeds: int) -> None:
    none = [row("none", seed, 0.3, metric=1.0) for seed in range(seeds)]
    dropout = [row("dropout", seed, 0.6 + off) for seed, off in enumerate(WOBBLE)]
    found = results(dial("paper", FALLING) + none + dropout)
    said = " ".join(notes(found, summarise(found), ["paper"], 450))
    assert "25% at q = 1 and 25% at q = 3 at the paper's scale" in said
    assert "sparser than the one without (0.30)" in said
    assert "reconstructs best" in said
    assert "agree to the last bit" in said

    none = [row("none", 0, 0.5, metric=20.0)]
    dropout = [row("dropout", seed, 0.6001) for seed in range(3)]
    found = results(dial("paper", FALLING) + none + dropout)
    said = " ".join(notes(found, summarise(found), ["paper"], 450))
    assert "sparser than the one without" not in said
    assert "reconstructs best" not in said
    assert "agree to the last bit" not in said
