"""Records of a report: a sequence of dicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload


class RecordSequence(Sequence[dict[str, Any]]):
    """A report that is a sequence of dicts, its records, which all have the same keys."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._records = list(records)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records)

    def __repr__(self) -> str:
        return str(self)

    def frame(self) -> Any:
        """The records as a pandas DataFrame. Raises: ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(f"{type(self).__name__}.frame needs pandas: pip install pandas") from error
        return pandas.DataFrame(self._records)
