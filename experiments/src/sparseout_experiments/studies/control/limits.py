"""The limits of what was run, as sentences for the page."""

from collections.abc import Sequence

from sparseout_experiments.studies.control import describe
from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.grid import Task


def limits(records: Sequence[Record]) -> list[str]:
    """What was run, how it was measured, and what follows from that for what may be concluded."""
    said = []
    for record in records:
        ran = describe.options(record.task, record.budget, record.config)
        title = describe.title(record.task, record.data)
        said.append(f"{title}: {describe.sizes(record.task, ran)}; {describe.network(record.task, ran)}.")
    tasks = [record.task for record in records]
    said += [_samples(task) for task in tasks]
    if "image" in tasks:
        said += [
            _batch_norm(),
            "Noise acts after the second ReLU of a residual block; the code published with the paper has it before "
            "the norm.",
        ]
    if {"image", "language"} & set(tasks):
        said.append("p was tuned on one seed out of two values.")
    return [
        *said,
        "Hoyer depends on the number of units: networks of different width are not to be compared by it. Over live "
        "units it compares rows of different length wherever the number of dead units differs, and "
        "leaving out more zeros lowers it by itself.",
        "A unit counts as live if it is active for at least one of the samples: fewer samples, as on validation data, "
        "have fewer live units.",
    ]


def _samples(task: Task) -> str:
    """The samples behind a measure on test data."""
    if task == "image":
        from sparseout_experiments.tasks.image import MEASURED

        return (
            f"image: a sample of the sparsity measures is one position of one of the first {MEASURED['test']:,} test "
            "images, its units are the channels."
        )
    if task == "language":
        from sparseout_experiments.tasks.language import MEASURED as WORDS

        return f"language: samples of the sparsity measures are the first {WORDS:,} words of the test text."
    return "autoencoder: samples of the sparsity measures are all test images."


def _batch_norm() -> str:
    from sparseout_experiments.tasks.image import REESTIMATED

    return (
        f"image: tested with batch norm re-estimated without noise, from up to {REESTIMATED['test']:,} training images."
    )
