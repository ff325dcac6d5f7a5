from itertools import combinations
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from small import options
from sparseout_experiments.data import hub, text
from sparseout_experiments.data.hub import DataError
from sparseout_experiments.tasks import DistributedContext, build
from sparseout_experiments.training.rng import Rng


def written(folder, pattern="{}.txt", **texts):
    for split, content in texts.items():
        (folder / pattern.format(split)).write_text(content, encoding="utf-8")
    return str(folder)


def read(corpus, stream):
    return " ".join(corpus.vocabulary[number] for number in stream.tolist())


@pytest.fixture
def folder(tmp_path):
    return written(
        tmp_path,
        train="b a <unk>\n\nc a b\na d\n",
        valid="a e\n",
        test="d <unk> b\n",
    )


def test_lines_end_with_eos_blank_ones_too_and_words_outside_train_are_unknown(folder):
    corpus = text.load(folder)
    assert corpus.vocabulary == ("<unk>", "<eos>", "a", "b", "c", "d")  # 3, 2, 1, 1 times
    assert read(corpus, corpus.train) == "b a <unk> <eos> <eos> c a b <eos> a d <eos>"
    assert read(corpus, corpus.valid) == "a <unk> <eos>"
    assert read(corpus, corpus.test) == "d <unk> b <eos>"
    assert corpus.train.dtype == torch.int64


def test_at_most_so_many_words(folder):
    corpus = text.load(folder, words=3)
    assert corpus.vocabulary == ("<unk>", "<eos>", "a")
    assert read(corpus, corpus.test) == "<unk> <unk> <unk> <eos>"


def test_the_vocabulary_is_that_of_the_tokens_kept(folder):
    corpus = text.load(folder, train_size=7, test_size=1)
    assert corpus.vocabulary == ("<unk>", "<eos>", "a", "b", "c")  # b before a, but a twice
    assert read(corpus, corpus.train) == "b a <unk> <eos> <eos> c a"
    assert read(corpus, corpus.test) == "<unk>"
    assert len(corpus.valid) == 3


def test_text_without_unknown_words_gets_them_from_those_that_occur_once(tmp_path):
    corpus = text.load(written(tmp_path, train="a b a c\nc d\n", valid="a\n", test="b\n"))
    assert corpus.vocabulary == ("<unk>", "<eos>", "a", "c")
    assert read(corpus, corpus.train) == "a <unk> a c <eos> c <unk> <eos>"


def test_ties_stand_in_the_order_of_first_occurrence(tmp_path):
    words = [f"w{number * 7919 % 5000}" for number in range(5000)]
    corpus = text.load(written(tmp_path, train=" ".join(["<unk>", *words]), valid="a", test="a"))
    assert list(corpus.vocabulary[2:]) == words


@pytest.mark.parametrize("sizes", [{"train_size": 13}, {"valid_size": 0}, {"test_size": 5}])
def test_a_size_the_text_does_not_have(folder, sizes):
    (name,) = sizes
    with pytest.raises(ValueError, match=f"expected `{name}` to be between 1 and the "):
        text.load(folder, **sizes)


def test_one_file_is_cut_in_three_without_a_gap(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\n".join(f"w{number % 7} w{number % 5}" for number in range(100)))
    corpus = text.load(str(file))
    assert [len(part) for part in corpus[1:]] == [240, 30, 30]
    whole = " <eos> ".join(file.read_text().split("\n")) + " <eos>"
    assert read(corpus, torch.cat(corpus[1:])) == whole


def test_penn_treebank_from_a_folder(tmp_path):
    source = written(tmp_path, "ptb.{}.txt", train=" a <unk> a \n", valid=" a \n", test=" N \n")
    assert read(text.load(source), text.load(source).train) == "a <unk> a <eos>"


@pytest.mark.parametrize("half", [True, False])
def test_penn_treebank_has_no_download(tmp_path, half):
    source = written(tmp_path, "ptb.{}.txt", train="a\n", test="a\n") if half else "PTB"
    with pytest.raises(DataError, match="no public download") as caught:
        text.load(source)
    assert "ptb.train.txt, ptb.valid.txt and ptb.test.txt" in str(caught.value)
    assert ("has no file 'ptb.valid.txt'" in str(caught.value)) is half


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: written(folder, train="a\n", valid="a\n"), "has no file 'test.txt': put it there"),
        (lambda folder: written(folder, train="a\n", valid="", test="a\n"), "The validation part of .* holds no text"),
        (lambda folder: str(folder / "none.txt"), "none.txt' does not exist"),
    ],
)
def test_missing_data_is_one_sentence(tmp_path, make, sentence):
    with pytest.raises(DataError, match=sentence):
        text.load(make(tmp_path))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"a b \xff\xfe c")
    with pytest.raises(DataError, match=r"is no text in UTF-8 .*: convert it to UTF-8"):
        text.load(str(tmp_path / "book.txt"))
    (tmp_path / "book.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is packed: unpack it"):
        text.load(str(tmp_path / "book.zip"))


@pytest.mark.parametrize("name", ["validation", "val", "dev"])
def test_the_validation_text_may_be_called_otherwise(tmp_path, name):
    written(tmp_path, train="a b\na b\n", test="a\n", **{name: "b b b\n"})
    assert len(text.load(str(tmp_path)).valid) == 4


def dataset(**columns):
    import datasets

    one = datasets.Dataset.from_dict(columns)
    return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), one))


def test_the_hub_is_asked_for_three_splits_of_the_configuration(monkeypatch):
    asked = []

    def load(source, wanted, *, name=None):
        asked.append((source, tuple(wanted), name))
        return dataset(text=["", " = A = \n", " a a\nb <unk> \n", None], other=[1, 2, 3, 4])

    monkeypatch.setattr(hub, "load", load)
    corpus = text.load("wikitext-2")
    assert asked == [("Salesforce/wikitext", ("train", "validation", "test"), "wikitext-2-v1")]
    assert read(corpus, corpus.valid) == "<eos> = A = <eos> a a <eos> b <unk> <eos> <eos>"


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"sentence": ["a"], "label": [0]}, True),
        ({"text": ["a"], "title": ["b"]}, True),
        ({"question": ["a"], "answer": ["b"]}, False),
        ({"label": [0]}, False),
    ],
)
def test_the_column_of_text(monkeypatch, columns, found):
    monkeypatch.setattr(hub, "load", lambda *_, **__: dataset(**columns))
    if found:
        assert len(text.load("some/thing").train) == 2
    else:
        with pytest.raises(DataError, match="no one column of text"):
            text.load("some/thing")


def test_a_folder_of_the_hubs_layout(tmp_path):
    for split, one in dataset(text=["a <unk>\n", ""]).items():
        one.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    corpus = text.load(str(tmp_path))
    assert read(corpus, corpus.test) == "a <unk> <eos> <eos>"


def test_topics_are_three_parts_that_share_no_paragraph():
    corpus = text.load("topics")
    sizes = np.array([len(part) for part in corpus[1:]])
    assert sizes.sum() > 50_000
    shares = sizes / sizes.sum()
    assert shares[0] > 0.65
    assert shares[1:].min() > 0.05
    lines = [set(part) for part in text._topics(topics)]
    assert [len(part) for part in text._topics(topics)] == [len(some) for some in lines]
    assert all(one.isdisjoint(other) for one, other in combinations(lines, 2))
    whole = (text._words_apart(one) for topic in topics.values() for one in topic.split("\n\n"))
    assert {one for one in whole if one} <= set.union(*lines)
    assert all((part == 0).any() for part in corpus[1:])


def test_words_of_topics_stand_apart_from_punctuation():
    found = text._words_apart("Names\n*****\n\nDon't use __x__, x=3.14...")
    assert found == "names don't use __x__ , x = 3 . 14 ..."


def test_columns_hold_stretches_of_the_stream():
    found = text.columns(torch.arange(11), 3)
    assert found.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert found.is_contiguous()
    with pytest.raises(ValueError, match="expected `batch` to be between 1 and half of the 11 tokens, but got 6"):
        text.columns(torch.arange(11), 6)


def covered(found):
    return [row for start, size in found for row in range(start, start + size)]


@pytest.mark.parametrize("length", [2, 35, 36, 37, 1000])
def test_windows_cover_every_row_that_has_a_next_one_once(length):
    for generator in (None, torch.Generator().manual_seed(length)):
        assert covered(text.windows(length, 35, generator)) == list(range(length - 1))


def test_fixed_windows():
    assert text.windows(11, 4) == [(0, 4), (4, 4), (8, 2)]


def test_variable_windows_have_the_sizes_of_the_paper():
    found = text.windows(1_000_000, 70, torch.Generator().manual_seed(3))
    sizes = np.array([size for _, size in found[:-1]])
    short = sizes < 52.5  # 3.5 standard deviations from either centre: 1 in 2000 on the wrong side
    n = len(sizes)
    assert short.mean() == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / n))
    for some, centre in ((sizes[~short], 70), (sizes[short], 35)):
        assert some.mean() == pytest.approx(centre, abs=4 * 5 / np.sqrt(len(some)))
        assert some.std() == pytest.approx(5, abs=4 * 5 / np.sqrt(2 * len(some)))
    assert found == text.windows(1_000_000, 70, torch.Generator().manual_seed(3))
    assert min(size for _, size in text.windows(10_000, 6, torch.Generator())[:-1]) == 5


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_word(tmp_path):
    (tmp_path / "a.txt").write_text("the cat\n" * 20, encoding="utf-8-sig")
    found = text.load(str(tmp_path / "a.txt"))
    assert found.vocabulary[found.train[0]] == "the"


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_part_of_one_word_has_nothing_to_predict(part):
    with pytest.raises(DataError, match=f"The {part} part of 'topics' has one word and nothing to predict"):
        build(options("language", **{f"{part}_size": 1}), Rng(0), DistributedContext(torch.device("cpu")))


def test_wikitext_as_it_is_packed(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.tokens").write_text(f"a {name} a\n")
    corpus = text.load(str(tmp_path))
    assert [len(part) for part in corpus[1:]] == [4, 4, 4]
    (tmp_path / "wiki.valid.tokens").unlink()
    with pytest.raises(DataError, match=r"has no file 'wiki.valid.tokens': put it there"):
        text.load(str(tmp_path))


@pytest.mark.parametrize(("tokens", "shape"), [(2, (2, 1)), (19, (2, 9)), (45, (4, 10))])
def test_short_parts_are_read_in_fewer_columns(tokens, shape):
    config = options("language", valid_size=tokens, test_size=tokens, batch=1)
    task = build(config, Rng(0), DistributedContext(torch.device("cpu")))
    assert [tuple(task.parts[name].shape) for name in ("valid", "test")] == [shape, shape]
