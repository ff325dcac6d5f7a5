"""The alternatives to Sparseout, each with its equation and its source, behind one interface."""

from sparseout.baselines.activations import ReLUSquared, StatisticalTopK, relu_squared, statistical_topk
from sparseout.baselines.bridgeout import bridgeout_
from sparseout.baselines.gaussian import GaussianDropout, gaussian_dropout
from sparseout.baselines.kwinners import KWinners
from sparseout.baselines.penalty import ActivityPenalty
from sparseout.baselines.penalty_terms import kl_penalty, lq_penalty
from sparseout.baselines.registry import METHODS, Attachment, make
from sparseout.baselines.shakeout import shakeout_
from sparseout.baselines.weights import revert_

__all__ = [
    "METHODS",
    "ActivityPenalty",
    "Attachment",
    "GaussianDropout",
    "KWinners",
    "ReLUSquared",
    "StatisticalTopK",
    "bridgeout_",
    "gaussian_dropout",
    "kl_penalty",
    "lq_penalty",
    "make",
    "relu_squared",
    "revert_",
    "shakeout_",
    "statistical_topk",
]
