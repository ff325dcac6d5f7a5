"""Data sets come from a folder or from the hub; what goes wrong is one sentence that says what to do."""

import logging

import pytest

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")

from PIL import Image  # noqa: E402
from sparseout_experiments.data.hub import DataError, load  # noqa: E402

pytestmark = pytest.mark.usefixtures("hub_cache")


@pytest.fixture
def folder(tmp_path):
    for split, numbers in (("train", [1, 2, 3]), ("test", [4])):
        datasets.Dataset.from_dict({"number": numbers}).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_a_folder_is_read_and_left_as_it_was(folder, capfd):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = load(str(folder))
    assert found["train"]["number"][:] == [1, 2, 3]
    assert found["test"]["number"][:] == [4]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_folder_that_changed_is_read_again(folder):
    load(str(folder))
    datasets.Dataset.from_dict({"number": [7, 8]}).to_parquet(folder / "test-00000-of-00001.parquet")
    assert load(str(folder))["test"]["number"][:] == [7, 8]


def test_a_folder_wins_over_a_name_of_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert set(load(folder.name)) == {"train", "test"}


@pytest.mark.parametrize("shown", [True, False])
def test_the_setting_of_the_progress_bars_comes_back(folder, shown):
    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        load(str(folder))
        assert datasets.are_progress_bars_disabled() is not shown
        with pytest.raises(DataError):
            load("./nowhere")
        assert datasets.are_progress_bars_disabled() is not shown
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def sentence(source, **options):
    with pytest.raises(DataError) as error:
        load(str(source), **options)
    (text,) = error.value.args
    assert "\n" not in text
    return text


def test_a_missing_split_is_named_with_the_file_to_add(folder):
    text = sentence(folder, wanted=("train", "validation"))
    assert "has no split named 'validation', only train, test" in text
    assert "validation-00000-of-00001.parquet" in text


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere-at-all", "a/b/c", ""])
def test_a_missing_folder_is_not_sought_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert sentence(source) == (
        f"{source!r} does not exist: name a folder that holds the data as train-*.parquet, "
        "test-*.parquet and validation-*.parquet"
    )


def test_a_file_is_no_folder(folder):
    assert "is a file: name a folder" in sentence(folder / "test-00000-of-00001.parquet")


def test_what_is_packed_is_to_be_unpacked(tmp_path):
    archive = tmp_path / "pictures.zip"
    archive.write_bytes(b"PK")
    assert sentence(archive).endswith("pictures.zip' is a file: unpack it and name the folder")
    assert sentence(tmp_path).endswith("unpack pictures.zip there")


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (
            ["cat", "dog"],
            "or put the files for it into the folder '{0}/test', and the others into one such as '{0}/train'",
        ),
        (
            ["train/cat", "train/dog"],
            "only train: add test-00000-of-00001.parquet to the others, or put the files for it into",
        ),
        (["Train/cat", "training/dog"], "holds both 'Train' and 'training': keep one of them"),
    ],
)
def test_folders_without_splits(tmp_path, folders, advice):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / folder / "1.png")
    assert advice.format(tmp_path) in sentence(tmp_path)


def test_an_empty_folder(tmp_path):
    assert "put whole files there, as train-*.parquet" in sentence(tmp_path)


def test_a_split_without_rows(folder):
    datasets.Dataset.from_dict({"number": [1]}).select([]).to_parquet(folder / "test-00000-of-00001.parquet")
    assert '"test"' in sentence(folder)


class Collect(logging.Handler):
    def __init__(self, said):
        super().__init__()
        self.said = said

    def emit(self, record):
        self.said.append(record.getMessage())


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_file_cut_short(folder, keep, monkeypatch):
    file = folder / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    said = []
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [Collect(said)])
    text = sentence(folder)
    assert said == []
    assert text.startswith(f"The data in {str(folder)!r} could not be read (")
    assert "put whole files there" in text


def test_a_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = sentence("somebody/numbers")
    assert text.startswith("The data set 'somebody/numbers' could not be had from the Hugging Face hub (")
    assert text.endswith("in a folder and name that instead")


def test_the_hub_is_asked_for_a_configuration(monkeypatch):
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"number": [1]})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("somebody/numbers", ["train"], name="small")["train"].num_rows == 1
    assert asked == [("somebody/numbers", "small")]
