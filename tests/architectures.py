"""Other people's architectures, from their configurations with random weights: nothing is downloaded."""

import importlib.util
import sys

import torch

_DECLARED = []  # torch forgets what it declares when the library object goes


def let_torchvision_import():
    """Declare the operators that torchvision wants to describe but cannot load beside a CPU build of torch.

    Its package on PyPI brings them compiled against torch for CUDA. They cannot be called then, and nothing here does;
    but transformers and timm import torchvision, which otherwise fails.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import torchvision  # noqa: F401
