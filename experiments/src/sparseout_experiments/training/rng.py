"""Where the random numbers of a run come from: a generator each for weights, shuffling, augmentation and noise.

So runs that differ in their noise start from the same weights and see the same batches.
"""

import hashlib
from typing import Any

import torch
from torch import Generator, Tensor


class Rng:
    """The generators of one process of a run. The noise is drawn from torch's own, on every device.

    Processes that train together share all but the noise.
    """

    def __init__(self, seed: int, process: int = 0) -> None:
        self.init, self.shuffle, self.augment = (
            Generator().manual_seed(_derived(seed, name)) for name in ("init", "order", "augment")
        )
        torch.manual_seed(_derived(seed, f"noise/{process}"))

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on from here."""
        noise: list[Tensor] = [torch.get_rng_state()]
        if torch.cuda.is_available():
            noise.append(torch.cuda.get_rng_state())
        return {"order": self.shuffle.get_state(), "augment": self.augment.get_state(), "noise": noise}

    def load(self, state: dict[str, Any]) -> None:
        self.shuffle.set_state(state["order"])
        self.augment.set_state(state["augment"])
        torch.set_rng_state(state["noise"][0])
        if torch.cuda.is_available() and len(state["noise"]) > 1:
            torch.cuda.set_rng_state(state["noise"][1])


def _derived(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
