"""The tables of grid.py in words, for the protocol and for the page of results."""

from sparseout.experiments.study.grid import ALWAYS, BUDGETS, GRIDS, SEEDS, TASKS, TUNING_SEED, Task, count

_SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "wikitext-2": "WikiText-2"}
_TITLES: dict[Task, str] = {
    "autoencoder": "Autoencoder on MNIST",
    "image": "Wide-ResNet on CIFAR-10",
    "language": "LSTM language model on WikiText-2",
}


def title(task: Task) -> str:
    """The heading of a task."""
    return _TITLES[task]


def listed(values: tuple[float, ...]) -> str:
    """Numbers with commas between them."""
    return ", ".join(f"{value:g}" for value in values)


def sizes(task: Task, budget: str) -> str:
    """How much data a budget takes, and how long."""
    given = BUDGETS[budget][task]
    unit = "words" if task == "language" else "images"

    def of(name: str) -> str:
        size = given[f"{name}_size"]
        return "all" if size is None else f"{size:,}"

    return f"{of('train')} / {of('valid')} / {of('test')} {unit}, {given['epochs']} epochs"


def network(task: Task, budget: str) -> str:
    """The network and how it is trained."""
    given = ALWAYS[task] | BUDGETS[budget][task]
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
        f"| {budget} | {task} | {sizes(task, budget)} | {network(task, budget)} |"
        for budget in BUDGETS
        for task in TASKS
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
