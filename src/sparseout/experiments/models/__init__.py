"""Models for the experiments. Each takes its noise layers and the generator of its initial weights."""

from sparseout.experiments.models.autoencoder import Autoencoder
from sparseout.experiments.models.language import LanguageModel
from sparseout.experiments.models.wide_resnet import WideResNet

__all__ = ["Autoencoder", "LanguageModel", "WideResNet"]
