"""The rule of what a step is, and of which steps are watched."""

from sparseout.monitor._steps import StepCounter


def test_a_call_of_the_model_is_a_step_of_its_mode():
    counter = StepCounter(every=2)
    for _ in range(3):
        counter.enter(training=True)
        parts = [counter.part(name, True) for name in ("a", "b", "a")]
        counter.leave()
        assert parts == [counter.counts["train"][1] % 2 == 1] * 3
    assert counter.counts == {"train": [2, 3], "eval": [0, 0]}
    assert counter.number(training=True) == 3


def test_calls_within_a_call_are_of_the_same_step():
    counter = StepCounter(every=1)
    counter.enter(True)
    counter.enter(True)
    counter.leave()
    counter.part("a", True)
    counter.leave()
    assert counter.counts["train"] == [1, 1]


def test_parts_alone_make_a_step_until_the_first_is_called_again():
    counter = StepCounter(every=2)
    watched = [counter.part(name, True) for name in ("a", "b", "b", "a", "b", "a")]
    assert watched == [True, True, True, False, False, True]
    assert counter.counts["train"] == [2, 3]


def test_a_part_belongs_to_the_mode_that_it_is_in():
    counter = StepCounter(every=1)
    for _ in range(2):
        counter.part("encoder", True)
        counter.part("decoder", True)
    for _ in range(3):
        counter.part("decoder", False)  # alone
    counter.part("encoder", True)
    assert counter.counts == {"train": [3, 3], "eval": [3, 3]}
    assert counter.watches("train")
    assert not counter.watches("eval")


def test_frozen_parts_have_steps_of_evaluation_within_those_of_training():
    counter = StepCounter(every=2)
    watched = []
    for _ in range(3):
        counter.enter(True)
        watched.append((counter.part("frozen", False), counter.part("free", True), counter.part("frozen", False)))
        counter.leave()
    assert watched == [(True,) * 3, (False,) * 3, (True,) * 3]
    assert counter.counts == {"train": [2, 3], "eval": [2, 3]}


def test_a_call_that_does_not_count_is_no_step_and_neither_hides_nor_ends_one():
    counter = StepCounter(every=1)
    counter.enter(True, counts=False)
    counter.leave()
    assert counter.counts["train"] == [0, 0]
    counter.enter(True)
    counter.enter(True, counts=False)  # recomputed, say
    counter.leave()
    counter.part("a", True)
    counter.leave()
    assert counter.counts["train"] == [1, 1]
    counter.leave()  # more often than entered, as after an error in somebody's hook
    counter.part("a", True)
    assert counter.counts["train"] == [2, 2]


def test_forgetting_a_mode_begins_its_count_and_closing_begins_a_step():
    counter = StepCounter(every=3)
    for _ in range(2):
        counter.part("a", True)
    counter.reset("train")
    assert counter.part("a", True)
    counter.enter(True)
    counter.close()
    assert counter.part("b", True) is False
    assert counter.counts["train"] == [1, 3]
