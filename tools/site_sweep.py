"""The page of a sweep, as `sparseout report` writes it, made from its small file: 5 MB that are not in the repository.

A hook of MkDocs.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from sparseout_experiments.studies.engine import frame, report

RESULTS = Path(__file__).parent.parent / "results/sweep-digits.json"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What MkDocs calls once it knows the files of the site."""
    files.append(File.generated(config, "how-to/sweep-digits.html", content=report.page(frame.load(RESULTS))))
    return files
