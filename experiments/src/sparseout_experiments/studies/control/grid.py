"""The plan of the study: the settings of every task, the budgets, and each setting as options of a run.

docs/protocol.md says the same in words; a test holds its numbers to the tables here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Task = Literal["autoencoder", "image", "language", "transformer"]
Role = Literal["grid", "tuning", "tuned", "common", "identity"]

TITLE = "# Results of the control study"  # of the page
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # not among SEEDS: what chose p does not also judge it


class Setting(NamedTuple):
    """One side of a comparison: a method, and for Sparseout its exponent, its scale and its gradient."""

    method: str
    q: float | None = None
    scale: str | None = None
    gradient: str | None = None

    @property
    def name(self) -> str:
        """A name for folders and tables, such as "q=1.5 matched exact"."""
        if self.q is None:
            return self.method
        return " ".join(part for part in (f"q={self.q:g}", self.scale, self.gradient) if part)


class Value(NamedTuple):
    """The option that is tuned, and one of its values."""

    option: str
    value: float

    def __str__(self) -> str:
        return f"{self.option.replace('_', ' ')} = {self.value:g}"


@dataclass(frozen=True)
class Grid:
    """One task: its measure of success (lower is better), its margin, and what is run."""

    metric: str
    q: tuple[float, ...]
    p: tuple[float, ...]  # a part of the grid, or the trials of tuning
    tuned: bool
    gradients: tuple[str, ...]
    scales: tuple[str, ...]
    decay: tuple[float, ...]  # the trials of "none" where there is tuning
    margin: float | None  # of the metric, between the extreme q's; None: no claim is made of it
    relative: bool  # whether the margin is a fraction of the metric


DIGITS = {"mse": 5, "error": 4, "perplexity": 2}  # of a metric, after the point
BOTH = ("matched", "paper")
GRIDS: dict[Task, Grid] = {
    "autoencoder": Grid(
        "mse", (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0), (0.2, 0.5), False, ("detached", "exact"), BOTH, (), None, False
    ),
    "image": Grid("error", (1.5, 2.0, 2.5, 3.0), (0.1, 0.3), True, ("detached",), BOTH, (5e-4, 5e-3), 0.003, False),
    "language": Grid(
        "perplexity", (1.5, 2.0, 2.5, 3.0), (0.2, 0.5), True, ("detached",), BOTH, (0.0, 0.1), 0.005, True
    ),
    "transformer": Grid(
        "perplexity", (1.5, 2.0, 3.0), (0.2, 0.5), True, ("detached",), ("matched",), (0.0, 0.1), 0.005, True
    ),
}
TASKS = tuple(GRIDS)
LEANER: dict[str, dict[str, Any]] = {"medium": {"q": (1.5, 2.0, 3.0), "scales": ("matched",)}}  # in place of the above
RUN_AS: dict[Task, str] = {"transformer": "language"}  # the task of `sparseout run`, where its name is another
HOYER_MARGIN = 0.01  # of Hoyer, between the extreme q's

# AWD-LSTM learns by SGD at a rate of 30, where the others of its task have AdamW at some thousandths.
_DECAY_TIMES = {("full", "language"): 1e-4}

# What every budget shares; options that are not named here keep the task's default.
ALWAYS: dict[Task, dict[str, Any]] = {
    "autoencoder": {"data": "mnist", "units": 256, "batch": 128, "lr": 1e-3},
    "image": {
        "data": "cifar10",
        "depth": 16,
        "norm": "batch",
        "place": "post-relu",
        "weight_decay": 5e-4,
        "lr": 0.1,
        "precision": "bf16",
        "channels_last": True,
    },
    "language": {"data": "wikitext-2", "weight_decay": 0.0},
    "transformer": {
        "data": "wikitext-2",
        "weight_decay": 0.0,
        "model": "transformer",
        "activation": "relu",
        "place": "ffn",
    },
}
# A size of None is all that the set has (for validation: the task's default). A budget has the tasks that it names.
BUDGETS: dict[str, dict[Task, dict[str, Any]]] = {
    "small": {
        "autoencoder": {"train_size": 10_000, "valid_size": 1_000, "test_size": 10_000, "epochs": 14},
        "image": {
            "train_size": 1_000, "valid_size": 500, "test_size": 2_000, "epochs": 6,
            "width": 2, "batch": 32, "schedule": "one-cycle", "augment": False,
        },
        "language": {
            "train_size": 40_000, "valid_size": 10_000, "test_size": 40_000, "epochs": 10,
            "words": 2_000, "model": "lstm", "layers": 2, "units": 200, "embedding": 200, "bptt": 35, "batch": 20,
            "lr": 5e-3,
        },
    },
    "medium": {
        "image": {
            "train_size": 45_000, "valid_size": 5_000, "test_size": 10_000, "epochs": 4,
            "depth": 10, "width": 2, "stride": 2, "batch": 64, "schedule": "one-cycle", "augment": False,
            "precision": "fp32",
        },
        "language": {
            "train_size": 40_000, "valid_size": 20_000, "test_size": 60_000, "epochs": 10,
            "words": 2_000, "model": "lstm", "layers": 2, "units": 400, "embedding": 400, "bptt": 35, "batch": 10,
            "lr": 3e-3,
        },
        "transformer": {
            "train_size": 60_000, "valid_size": 20_000, "test_size": 60_000, "epochs": 12,
            "words": 2_500, "layers": 2, "units": 512, "embedding": 128, "heads": 4, "bptt": 64, "batch": 5,
            "lr": 1e-3,
        },
    },
    "gpu": {
        "autoencoder": {"train_size": None, "valid_size": 6_000, "test_size": None, "epochs": 20},
        "image": {
            "train_size": None, "valid_size": 5_000, "test_size": None, "epochs": 30,
            "width": 4, "batch": 128, "schedule": "one-cycle", "augment": True,
        },
        "language": {
            "train_size": None, "valid_size": None, "test_size": None, "epochs": 20,
            "words": None, "model": "lstm", "layers": 2, "units": 650, "embedding": 650, "bptt": 35, "batch": 20,
            "lr": 2e-3,
        },
    },
    "full": {
        "autoencoder": {"train_size": None, "valid_size": 6_000, "test_size": None, "epochs": 100},
        "image": {
            "train_size": None, "valid_size": 5_000, "test_size": None, "epochs": 200,
            "depth": 28, "width": 10, "batch": 128, "schedule": "steps", "augment": True,
        },
        "language": {
            "train_size": None, "valid_size": None, "test_size": None, "epochs": 750,
            "words": None, "model": "awd", "layers": 3, "units": 1150, "embedding": 400, "bptt": 70, "batch": 80,
            "lr": 30.0, "weight_decay": 1.2e-6, "activation_penalty": 0.0,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: a setting, the value tried or chosen, a seed, and what the run is for."""

    task: Task
    setting: Setting
    value: Value | None
    seed: int
    role: Role

    def __str__(self) -> str:
        return f"{self.task}, {self.key}"

    @property
    def key(self) -> str:
        """The name of its folder. Role is no part of it: one training may serve two ends."""
        value = "" if self.value is None else f" {self.value.option}={self.value.value:g}"
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", f"{self.setting.name}{value} seed={self.seed}")


def grid_of(budget: str, task: Task) -> Grid:
    """The grid of a task at a budget."""
    return replace(GRIDS[task], **LEANER.get(budget, {}))


def settings(budget: str, task: Task) -> list[Setting]:
    """All settings, in the order of tables. q = 2 is one setting: gradient and scale change nothing there."""
    grid = grid_of(budget, task)
    others = [
        Setting("sparseout", q, scale, gradient)
        for scale in grid.scales
        for gradient in grid.gradients
        for q in grid.q
        if q != 2
    ]
    twos = [Setting("sparseout", 2.0)] if 2.0 in grid.q else []
    return [*twos, *others, Setting("none"), *([] if grid.tuned else [Setting("dropout")])]


def trials(budget: str, task: Task, setting: Setting) -> list[Value | None]:
    """The values of a setting that are run: of p, or for "none" of the weight decay."""
    grid = grid_of(budget, task)
    if setting.method == "none":
        return [Value("weight_decay", value) for value in grid.decay] if grid.tuned else [None]
    return [Value("p", value) for value in grid.p]


def first(budget: str, task: Task) -> list[Run]:
    """The runs that depend on no other: the whole grid, or where p is tuned, the trials."""
    tuned = grid_of(budget, task).tuned
    seeds: tuple[int, ...] = (TUNING_SEED,) if tuned else SEEDS
    role: Role = "tuning" if tuned else "grid"
    return [
        Run(task, setting, value, seed, role)
        for seed in seeds  # seed by seed: what is interrupted has compared all settings on the seeds it did
        for setting in settings(budget, task)
        for value in trials(budget, task, setting)
    ]


def second(budget: str, task: Task, chosen: Mapping[Setting, Value]) -> list[Run]:
    """The runs with the values that tuning chose.

    Every setting at its own value; at matched noise every q also at the p of q = 2, if its own is another, since
    noise is matched only where p is the same; and Dropout at that p, on the first seed, to be compared bit for bit.
    """
    if not grid_of(budget, task).tuned:
        return []
    reference = chosen.get(Setting("sparseout", 2.0))
    runs = [
        Run(task, setting, chosen[setting], seed, "tuned")
        for seed in SEEDS
        for setting in settings(budget, task)
        if setting in chosen
    ]
    if reference is not None:
        runs.append(Run(task, Setting("dropout"), reference, SEEDS[0], "identity"))
        runs += [
            Run(task, setting, reference, seed, "common")
            for seed in SEEDS
            for setting in settings(budget, task)
            if setting.scale == "matched" and setting in chosen and chosen[setting] != reference
        ]
    return runs


def choose(budget: str, task: Task, scores: Iterable[tuple[Run, float]]) -> dict[Setting, Value]:
    """The value of each setting with the lowest score on validation data; of equal ones the first that was listed.

    A setting one of whose trials has no score is left out until it has; a failed trial counts as infinite.
    """
    of_trial = {(run.setting, run.value): score for run, score in scores if run.role == "tuning"}
    chosen = {}
    for setting in settings(budget, task):
        tried = [value for value in trials(budget, task, setting) if value is not None]
        scored = {value: of_trial[setting, value] for value in tried if (setting, value) in of_trial}
        if tried and len(scored) == len(tried) and min(scored.values()) < float("inf"):
            chosen[setting] = min(tried, key=scored.__getitem__)
    return chosen


def options(run: Run, budget: str, sources: Mapping[str, str], common: Mapping[str, Any]) -> dict[str, Any]:
    """A run as options of `sparseout run`: the budget's, then what is compared.

    `sources` replaces data sets (a folder instead of a name on the hub), `common` adds what is not part of the study,
    such as a device.
    """
    given = {**common, **ALWAYS[run.task], **BUDGETS[budget][run.task], "seed": run.seed, "method": run.setting.method}
    given["data"] = sources.get(given["data"], given["data"])
    setting = run.setting
    if setting.q is not None:
        given["q"] = setting.q
        given["scale"] = setting.scale or "paper"
        given["gradient"] = setting.gradient or "detached"
    if run.value is not None:
        times = _DECAY_TIMES.get((budget, run.task), 1.0) if run.value.option == "weight_decay" else 1.0
        given[run.value.option] = times * run.value.value
    return {name: value for name, value in given.items() if value is not None}


def count(budget: str, task: Task) -> tuple[int, int]:
    """Runs of a task: at least, and at most (if every q at matched noise needs the p of q = 2 besides its own)."""
    if not grid_of(budget, task).tuned:
        return len(first(budget, task)), len(first(budget, task))
    chosen = {setting: value for setting in settings(budget, task) if (value := trials(budget, task, setting)[0])}
    least = len(first(budget, task)) + len(second(budget, task, chosen))
    return least, least + len(SEEDS) * sum(setting.scale == "matched" for setting in chosen)
