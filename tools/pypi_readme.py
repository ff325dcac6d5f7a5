"""The README for a package index: there its links and pictures need the address of the repository."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class PypiReadme(MetadataHookInterface):
    """Called by hatchling whenever it reads `pyproject.toml`, which names it."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme` in the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        at = f"{metadata['urls']['Repository']}/{{}}/v{metadata['version']}/"
        text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{at.format('raw')}", text)
        text = re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{at.format('blob')}", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
