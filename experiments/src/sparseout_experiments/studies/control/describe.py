"""Sizes, networks and samples of the study in words, for the protocol and for the page of results."""

from collections.abc import Mapping
from typing import Any

from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.grid import ALWAYS, BUDGETS, GRIDS, SEEDS, TASKS, TUNING_SEED, Task, count

_SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "wikitext-2": "WikiText-2"}
NETWORKS: dict[Task, str] = {"autoencoder": "autoencoder", "image": "Wide-ResNet", "language": "LSTM"}
_TITLES: dict[Task, str] = {
    "autoencoder": "Autoencoder",
    "image": "Wide-ResNet",
    "language": "LSTM language model",
}


def title(task: Task, data: str | None = None) -> str:
    """The heading of a task, whose data are those of the grid where nothing else is known."""
    data = data or ALWAYS[task]["data"]
    return f"{_TITLES[task]} on {_SETS.get(data, data)}"


def options(task: Task, budget: str, ran: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of a task: those that its runs had, and the budget's where these are not known."""
    return ALWAYS[task] | BUDGETS[budget][task] | dict(ran or {})


def listed(values: tuple[float, ...]) -> str:
    """Numbers with commas between them."""
    return ", ".join(f"{value:g}" for value in values)


def sizes(task: Task, given: Mapping[str, Any]) -> str:
    """Sizes of the data, and epochs."""
    unit = "words" if task == "language" else "images"

    def of(name: str) -> str:
        size = given[f"{name}_size"]
        return "all" if size is None else f"{size:,}"

    return f"{of('train')} / {of('valid')} / {of('test')} {unit}, {given['epochs']} epochs"


def samples(record: Record, part: str = "test") -> str:
    """The samples over which sparsity and dead units were measured."""
    if record.task == "image":
        from sparseout_experiments.tasks.image import MEASURED

        return f"{MEASURED[part]:,} images"
    if record.task == "language":
        from sparseout_experiments.tasks.language import MEASURED as WORDS

        return f"{WORDS:,} words"
    size = options(record.task, record.budget, record.config)[f"{part}_size"]
    return f"{'all' if size is None else f'{size:,}'} {part if part == 'test' else 'validation'} images"


def network(task: Task, given: Mapping[str, Any]) -> str:
    """The network of the options and how it is trained."""
    if task == "autoencoder":
        return f"784-{given['units']}-784, batch {given['batch']}, learning rate {given['lr']:g}"
    if task == "image":
        augmented = "with pad, crop and flip" if given["augment"] else "no augmentation"
        return (
            f"WRN-{given['depth']}-{given['width']}, batch {given['batch']}, {given['schedule']} schedule, "
            f"{augmented}, {given['precision']}"
        )
    words = "whole vocabulary" if given["words"] is None else f"{given['words']:,} words"
    kind = {"lstm": "LSTM", "awd": "AWD-LSTM"}[given["model"]]
    return (
        f"{given['layers']}-layer {kind}, {given['units']} units, {words}, batch {given['batch']}, "
        f"windows of {given['bptt']}, learning rate {given['lr']:g}"
    )


def budget_table() -> list[str]:
    """Markdown: every task at every budget."""
    lines = ["| budget | task | train / validation / test, epochs | network and training |", "|---|---|---|---|"]
    return lines + [
        f"| {budget} | {task} | {sizes(task, given)} | {network(task, given)} |"
        for budget in BUDGETS
        for task in TASKS
        for given in (options(task, budget),)
    ]


def grid_table() -> list[str]:
    """Markdown: what is compared in every task, and how many runs that is."""
    lines = ["| task | data | q | p | gradients | scales | also | runs |", "|---|---|---|---|---|---|---|--:|"]
    for task, grid in GRIDS.items():
        least, most = count(task)
        also = f"none (weight decay {listed(grid.decay)})" if grid.tuned else "none, Dropout"
        lines.append(
            f"| {task} | {_SETS[ALWAYS[task]['data']]} | {listed(grid.q)} | {listed(grid.p)}"
            f"{', tuned' if grid.tuned else ''} | {', '.join(grid.gradients)} | {', '.join(grid.scales)} | {also} | "
            f"{least}{f' to {most}' if most > least else ''} |"
        )
    return lines


def seeds() -> str:
    """The seeds in one line."""
    return f"{SEEDS[0]} to {SEEDS[-1]}; {TUNING_SEED} for tuning"
