"""Texts as streams of word numbers, and the columns and windows in which a language model reads them."""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparseout_experiments.data import hub
from sparseout_experiments.message import expected

UNKNOWN, END = "<unk>", "<eos>"
_SHARES = (0.8, 0.1, 0.1)
_SPLITS = ("train", "validation", "test")
SIZES = ("train_size", "valid_size", "test_size")

# name -> id on the hub and the configuration there
_ON_HUB = {"wikitext-2": ("Salesforce/wikitext", "wikitext-2-v1")}

# how a folder may name its three files; the first is that of the preprocessed Penn Treebank, the second WikiText's own
_FILES = ("ptb.{}.txt", "wiki.{}.tokens", "{}.txt")
_NAMED = (("train",), ("valid", "validation", "val", "dev"), ("test",))
_TREEBANK = ("ptb", "penn-treebank", "penn treebank")
_GET_TREEBANK = (
    "The Penn Treebank has no public download (it is licensed by the LDC): put ptb.train.txt, ptb.valid.txt and "
    "ptb.test.txt, as preprocessed by Mikolov, in a folder and name that"
)

Lines = Iterable[str]


class Corpus(NamedTuple):
    """Words by number, and three streams of such numbers: int64, 1-d."""

    vocabulary: tuple[str, ...]
    train: Tensor
    valid: Tensor
    test: Tensor


def load(
    source: str,
    *,
    train_size: int | None = None,
    valid_size: int | None = None,
    test_size: int | None = None,
    words: int | None = None,
) -> Corpus:
    """A text, its words numbered.

    Words are what stands between white space, and every line ends with `<eos>`, blank lines too: so counted,
    WikiText-2 and the Penn Treebank have the tokens that the literature reports. In "topics" words are in lower case
    and apart from punctuation, and `<eos>` ends a paragraph, since its lines are wrapped where no sentence ends.

    The vocabulary is that of the train part: `<unk>`, `<eos>`, then by falling frequency, ties in the order of first
    occurrence. Text that has no `<unk>` of its own leaves out the words that occur once, so that there is an `<unk>`
    to learn from.

    Args:
        source: "topics", the help texts that ship with Python (they differ between its versions); "wikitext-2" or
            the id of another data set of the hub with a column of text; a folder laid out like one, or with
            `ptb.train.txt`, `ptb.valid.txt`, `ptb.test.txt`, with the same names without `ptb.`, or with
            `wiki.train.tokens` and so on; or one text file, of which the first 80% of tokens are for training and the
            last 10% for testing.
        train_size: keep only the first so many tokens of train; `valid_size` and `test_size` likewise.
        words: most words of the vocabulary, `<unk>` and `<eos>` among them.

    Raises:
        DataError: for data that is missing, damaged or empty.
        ValueError: for a size that the text does not have.
    """
    numbers = {UNKNOWN: 0, END: 1}
    streams = [_stream(lines, numbers) for lines in _parts(source)]
    if len(streams) == 1:
        held = round(_SHARES[1] * len(streams[0]))
        streams = list(streams[0].split([len(streams[0]) - 2 * held, held, held]))
    sizes = (train_size, valid_size, test_size)
    cut = []
    for stream, split, name, size in zip(streams, _SPLITS, SIZES, sizes, strict=True):
        if len(stream) == 0:
            raise hub.DataError(f"The {split} part of {source!r} holds no text: give it a longer one")
        if size is not None and not 1 <= size <= len(stream):
            raise ValueError(expected(name, f"between 1 and the {len(stream)} tokens of {source!r}", size))
        cut.append(stream[:size])
    return _numbered(numbers, cut, words)


def columns(stream: Tensor, batch: int) -> Tensor:
    """The stream cut into `batch` stretches that are read side by side: (time, batch); the rest is left out."""
    if not 1 <= batch <= len(stream) // 2:
        raise ValueError(expected("batch", f"between 1 and half of the {len(stream)} tokens", batch))
    time = len(stream) // batch
    return stream[: time * batch].view(batch, time).t().contiguous()


def windows(length: int, bptt: int, generator: torch.Generator | None = None) -> list[tuple[int, int]]:
    """The windows (start, size) in which `length` rows of `columns` are read, one after the other.

    Each row but the last is in one window, and the row after it is what is to be predicted from it. Without
    `generator` every window has `bptt` rows. With it sizes vary as in Merity, Keskar & Socher (2017), section 4.1:
    around `bptt` with probability 0.95 and half of it otherwise, with standard deviation 5 and at least 5 rows; the
    learning rate of a window is then to be multiplied by size / bptt. The last window has what is left.
    """
    out, start = [], 0
    while start < length - 1:
        size = min(_size(bptt, generator), length - 1 - start)
        out.append((start, size))
        start += size
    return out


def _size(bptt: int, generator: torch.Generator | None) -> int:
    if generator is None:
        return bptt
    whole = torch.rand((), generator=generator).item() < 0.95
    spread = 5 * torch.randn((), generator=generator).item()
    return max(5, round((bptt if whole else bptt / 2) + spread))


def _parts(source: str) -> Sequence[Lines]:
    """The lines of train, validation and test, or those of one text."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _files(path) or _columns_of_text(source)
    if path.is_file():
        return [_lines(path)]
    if source == "topics":
        return _help_texts()
    if source.lower() in _TREEBANK:
        raise hub.DataError(_GET_TREEBANK)
    if path.suffix == ".txt":
        raise hub.DataError(f"The file {source!r} does not exist: name one that does, or a folder of three")
    return _columns_of_text(source)


def _files(folder: Path) -> list[Lines]:
    """The three files, or nothing if there is none of them."""
    for pattern in _FILES:
        paths = [[folder / pattern.format(name) for name in names] for names in _NAMED]
        present = [next((path for path in candidates if path.is_file()), None) for candidates in paths]
        missing = [candidates[0].name for candidates, path in zip(paths, present, strict=True) if path is None]
        if missing and len(missing) < len(paths):
            how = f". {_GET_TREEBANK}" if pattern == _FILES[0] else ": put it there"
            raise hub.DataError(f"The folder {str(folder)!r} has no file {missing[0]!r}{how}")
        if not missing:
            return [_lines(path) for path in present if path is not None]
    return []


def _lines(path: Path) -> Iterator[str]:
    if path.suffix.lower() in hub.ARCHIVES:
        raise hub.DataError(f"The file {str(path)!r} is packed: unpack it, and name the text or its folder")
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise hub.DataError(f"The file {str(path)!r} is no text in UTF-8 ({error}): convert it to UTF-8") from error
    except OSError as error:
        raise hub.DataError(f"The file {str(path)!r} cannot be read ({error.strerror}): make it readable") from error


def _columns_of_text(source: str) -> list[Lines]:
    name, configuration = _ON_HUB.get(source, (source, None))
    splits = hub.load(name, _SPLITS, name=configuration)
    features = splits["train"].features
    strings = [column for column, feature in features.items() if getattr(feature, "dtype", None) == "string"]
    column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column is None:
        raise hub.DataError(
            f"{source!r} has the columns {', '.join(features)} and no one column of text: name data with one, or call "
            "it 'text'"
        )
    return [_rows(splits[split][column]) for split in _SPLITS]


def _rows(texts: Iterable[str | None]) -> Iterator[str]:
    """A row may be a line, as in WikiText, or a document of many."""
    for text in texts:
        yield from (text or "").removesuffix("\n").split("\n")


@cache  # finding their words takes longer than a short training
def _help_texts() -> list[list[str]]:
    from pydoc_data.topics import topics

    return _topics(topics)


def _topics(topics: dict[str, str]) -> list[list[str]]:
    """Whole topics in a fixed random order, each in the part in which its middle lies when 80%, 10%, 10% are cut.

    A fifth of the text stands there twice, some topics being excerpts of others: of equal paragraphs only the first
    is kept, so that none is both learnt and tested.
    """
    names = sorted(topics)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    known: set[str] = set()
    kept: list[list[str]] = []
    for index in order:
        paragraphs = [_words_apart(text) for text in re.split(r"\n\s*\n", topics[names[index]])]
        kept.append([text for text in dict.fromkeys(paragraphs) if text and text not in known])
        known.update(kept[-1])
    ends = list(accumulate(sum(map(len, topic)) for topic in kept))
    parts: list[list[str]] = [[], [], []]
    for topic, end in zip(kept, ends, strict=True):
        middle = (end - sum(map(len, topic)) / 2) / ends[-1]
        parts[0 if middle < _SHARES[0] else 1 if middle < _SHARES[0] + _SHARES[1] else 2] += topic
    return parts


def _words_apart(text: str) -> str:
    """Lower case, with spaces between words and punctuation. A run of one sign is one word, such as `...`; from four
    on it is the line under a title and left out.
    """
    matches = re.finditer(r"\w+(?:['\u2019]\w+)*|([^\w\s])\1*", text.lower())
    return " ".join(match.group() for match in matches if not match[1] or len(match[0]) < 4)


def _stream(lines: Lines, numbers: dict[str, int]) -> Tensor:
    """The lines as numbers; `numbers` gets those of new words."""
    out = array("q")
    for line in lines:
        out.extend([numbers.setdefault(word, len(numbers)) for word in line.split()])
        out.append(numbers[END])
    return torch.frombuffer(out, dtype=torch.int64) if out else torch.empty(0, dtype=torch.int64)


def _numbered(numbers: dict[str, int], streams: Sequence[Tensor], words: int | None) -> Corpus:
    """From numbers by first occurrence to numbers by frequency in the first stream."""
    counts = torch.bincount(streams[0], minlength=len(numbers))
    least = 1 if counts[0] > 0 else 2
    order = counts[2:].argsort(descending=True, stable=True) + 2
    kept = order[counts[order] >= least]
    if words is not None:
        kept = kept[: words - 2]
    table = torch.zeros(len(numbers), dtype=torch.int64)
    table[1] = 1
    table[kept] = torch.arange(2, len(kept) + 2)
    names = list(numbers)
    vocabulary = (UNKNOWN, END, *(names[number] for number in kept.tolist()))
    return Corpus(vocabulary, *(table[stream] for stream in streams))
