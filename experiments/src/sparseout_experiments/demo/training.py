"""Training and measuring one autoencoder of the demonstration."""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout import Sparseout
from sparseout.measures import Streaming
from sparseout_experiments.data import Split
from sparseout_experiments.demo import (
    BATCH,
    BINS,
    HIGHEST,
    LEARNING_RATE,
    LOWEST,
    UNITS,
    Options,
    Pictures,
    Run,
    Setting,
    plan,
)
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.training.environment import one_thread


def run_all(options: Options, data: Split, on_epoch: Callable[[Setting, int], None]) -> Iterator[Run]:
    """Train and measure run after run; `on_epoch` hears of every epoch."""
    with one_thread():
        for setting, seed in plan(options):
            yield train(setting, seed, options, data, on_epoch)


def noise_layer(setting: Setting, options: Options) -> nn.Module:
    """The layer on the code."""
    if setting.method == "none":
        return nn.Identity()
    if setting.method == "dropout":
        return nn.Dropout(options.p)
    assert setting.q is not None
    scale = None if setting.scale == "paper" else setting.scale
    return Sparseout(options.p, setting.q, gradient=options.gradient, scale=scale)


def train(setting: Setting, seed: int, options: Options, data: Split, on_epoch: Callable[[Setting, int], None]) -> Run:
    """Train one autoencoder and measure its code."""
    started = time.perf_counter()
    weights, order = (torch.Generator().manual_seed(3 * seed + stream) for stream in range(2))
    with torch.random.fork_rng(devices=[]):
        model = Autoencoder(data.train.shape[1], UNITS, noise_layer(setting, options), weights)
        torch.default_generator.manual_seed(3 * seed + 2)  # the noise
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
        for _ in range(options.epochs):
            for batch in torch.split(torch.randperm(len(data.train), generator=order), BATCH):
                x = data.train[batch]
                loss = F.mse_loss(model(x), x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            on_epoch(setting, seed)
    return measure(model, setting, seed, data.test, time.perf_counter() - started)


@torch.no_grad()
def measure(model: Autoencoder, setting: Setting, seed: int, test: Tensor, seconds: float) -> Run:
    """Measure a trained model; the pictures are kept for the first seed."""
    model.eval()
    code = model.code(test)
    reconstruction = model(test)
    streaming = Streaming(("hoyer", "gini", "density"))
    streaming.update(code)
    found = streaming.compute()
    exponents = code[code > 0].log10().clamp(LOWEST, HIGHEST)
    return Run(
        setting=setting,
        seed=seed,
        hoyer=float(found["hoyer"]),
        hoyer_live=float(found["hoyer_live"]),
        gini=float(found["gini"]),
        density=float(found["density"]),
        dead=float(found["dead_units"] / found["units"]),
        rows=int(found["rows"]),
        undefined_rows=int(found["undefined_rows"]),
        error=F.mse_loss(reconstruction, test).item(),
        seconds=seconds,
        histogram=[int(count) for count in torch.histc(exponents, BINS, LOWEST, HIGHEST)],
        pictures=Pictures(_busiest_filters(model, code), reconstruction[:10].clone()) if seed == 0 else None,
    )


def mean_error(data: Split) -> float:
    """The error of answering every test digit with the average training digit: what a network must beat."""
    return F.mse_loss(data.train.mean(0).expand_as(data.test), data.test).item()


def _busiest_filters(model: Autoencoder, code: Tensor, count: int = 10) -> Tensor:
    """The decoder's weights of the units that contribute most to the reconstructions."""
    weight = model.decoder.weight.t()
    power = code.square().mean(0) * weight.square().sum(1)
    return weight[power.topk(count).indices].clone()
