import gc
import shutil

import architectures
import pytest
import torch

from sparseout.kernels import backends

architectures.let_torchvision_import()  # before anything imports transformers or timm

COMPILER = shutil.which("g++") or shutil.which("clang++")

needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="torch.compile on a CPU needs a C++ compiler and none was found"
)
needs_symbols = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="sizes as symbols were tried with the compiler of torch 2.13 alone",
)


def pytest_collection_finish():
    gc.freeze()  # what was imported stays: a million objects that no collection needs to go through


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def process_group(tmp_path):
    """The processes of a run that has one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def hub_cache(tmp_path_factory, monkeypatch):
    """Data sets are cached in a folder of the test."""
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _fresh_setting():
    yield
    backends._setting.cache_clear()
