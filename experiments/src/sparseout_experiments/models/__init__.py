"""Models for the experiments. Each takes its noise layers and the generator of its initial weights."""

from sparseout_experiments.models.autoencoder import Autoencoder
from sparseout_experiments.models.language import LanguageModel
from sparseout_experiments.models.transformer import Transformer
from sparseout_experiments.models.wide_resnet import WideResNet

__all__ = ["Autoencoder", "LanguageModel", "Transformer", "WideResNet"]
