"""The limits of what was run, as sentences for the page."""

from collections.abc import Sequence

from sparseout_experiments.studies.control import describe
from sparseout_experiments.studies.control.collect import Record
from sparseout_experiments.studies.control.grid import Task


def limits(records: Sequence[Record]) -> list[str]:
    """Sizes, samples and procedures of what was run, and the limits that they set to conclusions."""
    said = []
    for record in records:
        ran = describe.options(record.task, record.budget, record.config)
        title = describe.title(record.task, record.data)
        said.append(f"{title}: {describe.sizes(record.task, ran)}; {describe.network(record.task, ran)}.")
    tasks = [record.task for record in records]
    said += [f"{record.task}: {_SAMPLES[record.task].format(describe.samples(record))}." for record in records]
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
        "Hoyer depends on the number of units, so it does not compare networks of different width. Over live units it "
        "compares rows of different length wherever the number of dead units differs, and leaving out more zeros "
        "lowers it by itself.",
        "A unit counts as live if it is active for at least one of the samples: over fewer samples, as on validation "
        "data, fewer units are live.",
    ]


_SAMPLES: dict[Task, str] = {
    "autoencoder": "sparsity and dead units are measured over {}",
    "image": "sparsity is measured at every position of the first {} of the test set, its units are the channels",
    "language": "sparsity is measured over the first {} of the test text",
}


def _batch_norm() -> str:
    from sparseout_experiments.tasks.image import REESTIMATED

    return (
        f"image: tested with batch norm re-estimated without noise, from up to {REESTIMATED['test']:,} training images."
    )
