import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sparseout_experiments.studies.control import collect, grid
from sparseout_experiments.studies.control.collect import Ledger, Record
from sparseout_experiments.studies.control.dial import COLLAPSED, Curve, Dial
from sparseout_experiments.studies.control.grid import SEEDS, Setting, Task, Value
from sparseout_experiments.studies.control.page import Task as OfPage
from sparseout_experiments.studies.control.verdicts import (
    LAST,
    SOUND,
    Contrast,
    ContrastResult,
    alive,
    both,
    contrasts,
    dial_of,
    evaluate,
    identity,
    judge,
    none_is_best,
    post_hoc,
)
from study_rows import ledger_of, result_of

C1 = Contrast("C1", "autoencoder", "hoyer", "matched", "detached", 0.5, True)
C2 = Contrast("C2", "image", "metric", "matched", "detached", "own", True)
C3 = Contrast("C3", "language", "metric", "matched", "detached", "own", True)
Q = (1.5, 2.0, 2.5, 3.0)
CONTRASTS, POST_HOC = contrasts("small"), post_hoc("small")
NOISE = (0.4, -1.0, 0.7, -0.6, 0.5)  # mean 0


def curve(*means: float, noise: float = 0.0, seeds: int = 5, common: float = 0.0) -> Curve:
    """Values at Q; `noise` differs from point to point, `common` from seed to seed."""
    return {
        q: {seed: mean + noise * NOISE[(seed + place) % 5] + common * NOISE[seed] for seed in range(seeds)}
        for place, (q, mean) in enumerate(zip(Q, means, strict=True))
    }


def record_of(tmp_path: Path, task: Task, effect: float = 1.0, seeds: int = 5) -> Record:
    return collect.load(collect.save(tmp_path, "small", task, ledger_of(task, effect=effect, seeds=seeds)))


@pytest.mark.parametrize(
    ("contrast", "found", "word"),
    [
        (C2, curve(0.56, 0.55, 0.54, 0.53, noise=0.003), "supported"),
        (C2, curve(0.53, 0.54, 0.55, 0.56, noise=0.003), "contradicted"),
        (C2, curve(0.55, 0.55, 0.55, 0.55, noise=0.0005), "no effect"),
        (C2, curve(0.55, 0.55, 0.55, 0.55, noise=0.01), "undecided"),
        (C3, curve(45, 46, 47, 48, noise=0.2), "supported"),  # it says the opposite direction of C2
        (C3, curve(48, 47, 46, 45, noise=0.2), "contradicted"),
        (C3, curve(46, 46, 46, 46, noise=0.05), "no effect"),
        (C3, curve(46, 46, 46, 46, noise=0.5), "undecided"),
        (C1, curve(0.6, 0.5, 0.4, 0.3, noise=0.02), "supported"),
        (C1, curve(0.3, 0.4, 0.5, 0.6, noise=0.02), "contradicted"),
        (C1, curve(0.4, 0.4, 0.4, 0.4, noise=0.002), "no effect"),
        (C1, curve(0.4, 0.4, 0.4, 0.4, noise=0.05), "undecided"),
    ],
)
def test_each_of_the_four_words(contrast: Contrast, found: Curve, word: str) -> None:
    assert judge(contrast, found).verdict == word


def test_a_clear_trend_too_small_to_matter_is_no_effect() -> None:
    small = judge(C2, curve(0.5510, 0.5505, 0.5500, 0.5495, noise=0.0001))
    assert small.slope.high < 0
    assert small.verdict == "no effect"


def test_a_valley_between_equal_ends_is_not_no_effect() -> None:
    valley = judge(C2, curve(0.55, 0.53, 0.53, 0.55, noise=0.0005))
    assert valley.ends.high < 0.003
    assert valley.span == pytest.approx(0.02, abs=1e-3)
    assert valley.verdict == "undecided"


def test_four_seeds_are_undecided_however_clear() -> None:
    found = judge(C2, curve(0.6, 0.5, 0.4, 0.3, noise=0.001, seeds=4))
    assert found.slope.high < 0
    assert (found.verdict, found.slope.n) == ("undecided", 4)
    assert found.why == "4 of 5 seeds have a value at every q"


def test_a_seed_that_failed_at_one_q_is_not_imputed() -> None:
    whole = curve(0.6, 0.5, 0.4, 0.3, noise=0.001)
    del whole[2.5][3]
    assert (judge(C2, whole).verdict, judge(C2, whole).slope.n) == ("undecided", 4)
    whole[2.5][3] = math.inf  # a metric that is not finite is a failure, not a value
    assert (judge(C2, whole).verdict, judge(C2, whole).slope.n) == ("undecided", 4)


def test_a_q_whose_measure_is_undefined_leaves_the_contrast_for_all_seeds() -> None:
    found = curve(0.9, 0.5, 0.4, 0.3, noise=0.01)
    found[1.5][2] = math.nan
    one = judge(C1, found)
    assert (one.q, one.left_out, one.slope.n, one.verdict) == ((2.0, 2.5, 3.0), (1.5,), 5, "supported")
    found[3.0][0] = math.nan
    two = judge(C1, found)
    assert (two.verdict, two.why) == ("undecided", "the measure is defined at 2 q's")


def test_nothing_is_undecided() -> None:
    assert evaluate(C1, None).verdict == judge(C2, {}).verdict == "undecided"
    assert evaluate(C1, None).why == "no runs yet"
    assert judge(C2, {1.5: {0: 0.5}, 3.0: {}}).why == "0 of 5 seeds have a value at every q"


def test_the_numbers_are_scipys() -> None:
    found = curve(48, 47, 46, 45, noise=0.3, common=2.0)
    lines = np.array([[found[q][seed] for q in Q] for seed in SEEDS])
    slopes = [stats.linregress(Q, line).slope for line in lines]
    ends = (lines[:, -1] - lines[:, 0]) / lines[:, 0]
    one = judge(C3, found)
    for values, interval in ((slopes, one.slope), (ends, one.ends)):
        low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
        assert (interval.low, interval.high) == pytest.approx((low, high))
    means = lines.mean(0)
    assert one.span == pytest.approx((means.max() - means.min()) / means[0])
    # what differs from seed to seed at every q alike does not widen a contrast
    assert judge(C2, curve(0.5, 0.5, 0.5, 0.5, noise=0.001, common=0.1)).slope.half == pytest.approx(
        judge(C2, curve(0.5, 0.5, 0.5, 0.5, noise=0.001)).slope.half
    )


def test_all_and_live_units_must_share_a_word() -> None:
    def said(word: str) -> ContrastResult:
        return judge(C1, curve(0.6, 0.5, 0.4, 0.3))._replace(verdict=word)  # type: ignore[arg-type]

    assert both([said("supported"), said("supported")]) == "supported"
    assert both([said("supported"), said("no effect")]) == "undecided"
    assert both([said("supported"), said("contradicted")]) == "undecided"


def test_the_primary_contrasts_are_the_protocols() -> None:
    primary = [(one.claim, one.task, one.measure, one.p) for one in CONTRASTS if one.primary]
    assert primary == [
        ("C1", "autoencoder", "hoyer", 0.5),
        ("C1", "autoencoder", "hoyer_live", 0.5),
        ("C2", "image", "metric", "own"),
        ("C3", "language", "metric", "own"),
    ]
    assert all((one.scale, one.gradient) == ("matched", "detached") for one in CONTRASTS if one.primary)
    assert len(set(CONTRASTS)) == len(CONTRASTS)


@pytest.mark.parametrize("effect", [1.0, -1.0])
def test_made_up_results_get_the_words_they_were_made_for(tmp_path: Path, effect: float) -> None:
    word = "supported" if effect > 0 else "contradicted"
    for contrast in CONTRASTS:
        if contrast.primary:
            assert evaluate(contrast, record_of(tmp_path, contrast.task, effect)).verdict == word


def test_own_and_common_p_are_kept_apart(tmp_path: Path) -> None:
    ledger = ledger_of("image")
    setting = Setting("sparseout", 1.5, "matched", "detached")
    trial = next(run for run in ledger.results if run.setting == setting and run.value == Value("p", 0.3))
    ledger.results[trial]["valid"]["error"] = 0.1  # now q = 1.5 chooses another p than q = 2
    again = Ledger({run: result for run, result in ledger.results.items() if run.role == "tuning"})
    for run in grid.second("small", "image", again.chosen("small", "image")):
        again.results[run] = result_of("image", grid.options(run, "small", {}, {}))
    record = collect.load(collect.save(tmp_path, "small", "image", again))
    own, common = (Dial(record, "matched", "detached", place).of(1.5) for place in ("own", "common"))  # type: ignore[arg-type]
    assert [run.value for run in own["run"]] == [Value("p", 0.3)] * 5
    assert [run.value for run in common["run"]] == [Value("p", 0.1)] * 5
    assert set(common["role"]) == {"common"}


def test_trials_of_tuning_are_never_analysed(tmp_path: Path) -> None:
    record = record_of(tmp_path, "language")
    dial = Dial(record, "matched", "detached", "own")
    assert set(dial.rows["seed"]) == set(SEEDS)
    assert all(set(values) == set(SEEDS) for values in dial.curve("metric").values())


def test_identity_counts_pairs_and_sees_one_bit(tmp_path: Path) -> None:
    record = record_of(tmp_path, "autoencoder")
    assert identity([record]) == ("supported", 10, 10)
    ledger = ledger_of("autoencoder")
    run = next(run for run in ledger.results if run.setting.method == "dropout")
    code = ledger.results[run]["sparsity"]["other"]
    code["gini"] = math.nextafter(code["gini"], 1.0)
    other = collect.load(collect.save(tmp_path, "small", "autoencoder", ledger))
    assert identity([other]) == ("contradicted", 10, 9)
    assert identity([]) == ("undecided", 0, 0)


@pytest.mark.parametrize(
    ("told", "gpu", "word"),
    [
        ("cpu", "a GPU", "supported"),  # it was there, and was left alone
        ("auto", None, "supported"),
        ("auto", "a GPU", "undecided"),
        ("cuda", "a GPU", "undecided"),
    ],
)
def test_identity_asks_what_the_runs_used(tmp_path: Path, told: str, gpu: str | None, word: str) -> None:
    ledger = ledger_of("autoencoder")
    for result in ledger.results.values():
        result["config"]["device"] = told
        result["environment"]["gpu"] = gpu
    record = collect.load(collect.save(tmp_path, "small", "autoencoder", ledger))
    assert identity([record]).verdict == word
    one = record.frame.index[record.frame["method"] == "dropout"][-1]
    assert identity([changed(record, one, device="gpu")]).verdict == "undecided"


def changed(record: Record, where: Any, **values: Any) -> Record:
    """The same record with other values in some rows."""
    frame = record.frame.copy()
    for name, value in values.items():
        frame.loc[where, name] = value
    return replace(record, frame=frame)


def collapse(record: Record, *qs: float, share: float = 0.051) -> Record:
    """The same record, one seed of C1's contrast collapsed at some q's, and its Hoyer there at 1."""
    dial = Dial(record, "matched", "detached", 0.5)
    rows = dial.rows[dial.rows["q"].isin(qs)]
    record = changed(record, rows.index, hoyer=1.0, hoyer_live=1.0)
    return changed(record, rows.index[rows["seed"] == 3], undefined=share)


def test_the_sensitivity_contrasts_stand_beside_c1_and_decide_nothing() -> None:
    assert [(one.measure, one.post_hoc) for one in POST_HOC] == [
        ("hoyer", SOUND),
        ("hoyer_live", SOUND),
        ("last_hoyer", LAST),
        ("last_hoyer_live", LAST),
    ]
    assert {(one.claim, one.task, one.scale, one.gradient, one.p) for one in POST_HOC} == {
        ("C1", "autoencoder", "matched", "detached", 0.5)
    }
    assert not any(one.primary for one in POST_HOC)
    assert not set(POST_HOC) & set(CONTRASTS)


def test_collapsed_q_are_left_out_of_the_sensitivity_contrast_alone(tmp_path: Path) -> None:
    record = record_of(tmp_path, "autoencoder")
    fallen = collapse(record, 0.5, 1.0)
    assert evaluate(C1, fallen).q == (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    for contrast in POST_HOC[:2]:
        one = evaluate(contrast, fallen)
        assert (one.q, one.left_out) == ((1.5, 2.0, 2.5, 3.0, 4.0), (0.5, 1.0))
        values = Dial(record, "matched", "detached", 0.5).rows.pivot(index="seed", columns="q", values=contrast.measure)
        lines = values[list(one.q)].to_numpy()
        assert one.slope.mean == pytest.approx(np.mean([stats.linregress(one.q, line).slope for line in lines]))
        assert one.slope.n == 5
    at_the_edge = collapse(record, 0.5, 1.0, share=COLLAPSED)
    assert not evaluate(POST_HOC[0], at_the_edge).left_out
    few = evaluate(POST_HOC[0], collapse(record, 0.5, 1.0, 1.5, 2.5, 3.0))
    assert (few.q, few.verdict, few.why) == ((2.0, 4.0), "undecided", "the measure is defined at 2 q's")


def test_the_last_epoch_has_a_contrast_of_its_own(tmp_path: Path) -> None:
    record = record_of(tmp_path, "autoencoder")
    one, other = (evaluate(contrast, record) for contrast in POST_HOC[2:])
    assert one.slope.mean == pytest.approx(evaluate(C1, record).slope.mean + 0.002)  # as the made-up results have it
    live = evaluate(C1._replace(measure="hoyer_live"), record)
    assert other.slope.mean == pytest.approx(live.slope.mean + 0.003)
    older = changed(record, slice(None), last_hoyer=math.nan)
    assert (evaluate(POST_HOC[2], older).verdict, evaluate(POST_HOC[2], older).why) == (
        "undecided",
        "not in these results",
    )


def test_live_units_are_all_units_where_none_is_dead_in_any_run(tmp_path: Path) -> None:
    record = record_of(tmp_path, "language")
    contrast = next(one for one in CONTRASTS if (one.task, one.claim) == ("language", "C1"))
    assert not alive(record, contrast)
    none = changed(record, slice(None), dead=0.0)
    assert alive(none, contrast)
    assert not alive(changed(none, dial_of(contrast, none).of(3.0).index[0], dead=0.01), contrast)
    assert not alive(None, contrast)
    assert not alive(replace(record, frame=record.frame[:0]), contrast)


def test_none_is_best_compares_validation_data(tmp_path: Path) -> None:
    record = record_of(tmp_path, "image")
    assert none_is_best(record) is True  # by the formula: less noise, less error
    assert none_is_best(changed(record, record.frame["method"] == "none", valid=9.0)) is False
    assert none_is_best(replace(record, frame=record.frame[:0])) is None


def test_undefined_samples_above_one_in_a_hundred_are_warned_of(tmp_path: Path) -> None:
    record = record_of(tmp_path, "image")
    assert OfPage(changed(record, [0, 1], undefined=[0.011, 0.01])).undefined == [0.011]
