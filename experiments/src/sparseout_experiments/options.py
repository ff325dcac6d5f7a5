"""The options of a run: those of every run, and those of each task, a class for each.

A run has those of one task and one method, in one class made of both (`config`): what a method has no use for is not
there, and given all the same it is an error.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, model_validator

from sparseout_experiments import option_types as types
from sparseout_experiments.methods import METHODS, Refused
from sparseout_experiments.option_types import option


class Training(BaseModel):
    """Training."""

    seed: types.Seed = option(0, "Seed of weights, order, augmentation and noise.")
    epochs: types.Count = option(20, "Epochs of the schedule.")
    budget_minutes: types.Positive | None = option(
        None, "Minutes of training, evaluation included, after which the schedule has ended."
    )
    batch: types.Count = option(64, "Examples a step and process.")
    lr: types.NonNegative = option(1e-3, "Learning rate at its highest.")
    weight_decay: types.NonNegative = option(0.0, "Weight decay.")
    clip: types.NonNegative = option(0.0, "Largest norm of the gradient, 0 for none.")


class Data(BaseModel):
    """Data."""

    data: types.Text = option("", "A data set: a name, a hub id, a folder or a file.")
    train_size: types.Count | None = option(None, "Use only so many training examples (tokens).")
    valid_size: types.Count | None = option(
        None, "Hold out so many for validation.", shown="a tenth of train, or what the set has"
    )
    test_size: types.Count | None = option(None, "Test on only so many.")
    split_seed: types.TorchSeed = option(0, "Seed of the split into training and validation.")

    def sizes(self) -> dict[str, Any]:
        """Sizes of the parts of a data set, as `data.images.load` takes it."""
        return self.model_dump(include={"train_size", "valid_size", "test_size", "split_seed"})


class Machine(BaseModel):
    """Machine and records."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU where there is one.")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "Of matrix products and activations.")
    compile: types.Flag = option(False, "Compile the training step.")
    checkpoint_minutes: types.NonNegative = option(5.0, "Minutes between checkpoints; each epoch ends with one.")
    track: types.Tracker | None = option(None, "A tracker that Accelerate knows, such as tensorboard.")


class Config(Machine, Data, Training):
    """The options of every task."""

    defaults: ClassVar[Mapping[str, Any]] = {}  # of the method's options, where a task has its own
    if TYPE_CHECKING:  # a field of every class that has a method's options too
        method: str

    def arguments(self) -> dict[str, Any]:
        """The method's options that `sparseout.baselines.make` takes."""
        return {name: getattr(self, name) for name in METHODS[self.method].model_fields if name != "method"}


class Autoencoder(Config):
    """Reconstruct images through one hidden ReLU layer, with the noise on its code."""

    data: types.Text = option("digits", "digits, mnist, cifar10, cifar100, a hub id or a folder of images.")
    units: types.Count = option(256, "Width of the code.")


class Image(Config):
    """Classify images with a Wide-ResNet, with the noise between the two convolutions of every block."""

    defaults = {"p": 0.3}

    data: types.Text = option("digits", "digits, mnist, cifar10, cifar100, a hub id or a folder of images with labels.")
    depth: types.Depth = option(16, "Number of layers, 6 n + 4.")
    width: types.Count = option(2, "Factor on the channels 16, 32, 64.")
    stride: types.Count = option(1, "Of the first convolution: 2 makes all that follows four times cheaper.")
    norm: Literal["batch", "group", "none"] = option("batch", "Normalisation.")
    place: Literal["post-relu", "pre-norm"] = option(
        "post-relu",
        "Place of the noise: after the second ReLU (Zagoruyko & Komodakis 2016), or between the first "
        "convolution and the second norm (the code published with the paper).",
    )
    epochs: types.Count = option(10, "Epochs of the schedule.")
    schedule: Literal["one-cycle", "steps"] = option(
        "one-cycle", "Of the learning rate; steps: times 0.2 at 30, 60 and 80%."
    )
    batch: types.Count = option(128, "Images a step and process.")
    lr: types.NonNegative = option(0.1, "Learning rate at its highest.")
    momentum: types.Probability = option(0.9, "Nesterov momentum.")
    weight_decay: types.NonNegative = option(5e-4, "Weight decay.")
    augment: types.Flag = option(True, "Pad, crop and, as --flip says, mirror the training images.")
    flip: types.Flag | None = option(
        None, "Mirror them left to right, half of the time.", shown="coloured yes, grey no"
    )
    channels_last: types.Flag = option(False, "Memory format of the network.")

    @model_validator(mode="after")
    def _after_relu(self) -> Self:
        if self.place == "pre-norm" and (reason := _AFTER_RELU.get(self.method)):
            raise Refused("place", f"post-relu, as {self.method} {reason}", "'pre-norm'")
        return self


_AFTER_RELU = {
    "bridgeout": "acts on the convolution after the noise",
    "shakeout": "acts on the convolution after the noise",
    "kwinners": "takes the largest of activations that are not negative",
    "relu2": "is the activation, which comes after the norm",
    "statistical_topk": "is the activation, which comes after the norm",
}


def _by_model(description: str, lstm: Any, **others: Any) -> Any:
    """A field with a default for each kind of language model; those that are not named have the LSTM's."""
    shown = [
        (f"{name} " if name else "") + ({True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value:g}")
        for name, value in {"": lstm, **others}.items()
    ]
    return option(lambda given: others.get(given.get("model"), lstm), description, shown=", ".join(shown))


def _as(name: str, description: str) -> Any:
    """A field whose default is another's value."""
    return option(lambda given: given.get(name), description, shown=f"as {name}")


class PlacesOfP(BaseModel):
    """p of each place in a language model."""

    p_input: types.Probability = _as("p", "p on the embedding.")
    p_between: types.Probability = _as("p", "p between layers.")
    p_output: types.Probability = _as("p", "p on the last layer.")


class PlacesOfQ(BaseModel):
    """q of each place in a language model."""

    q_input: types.NonNegative = _as("q", "q on the embedding.")
    q_between: types.NonNegative = _as("q", "q between layers.")
    q_output: types.NonNegative = _as("q", "q on the last layer.")


class LanguageKind(BaseModel):
    """Options that decide about other defaults, and so are read before them."""

    model: Literal["lstm", "awd", "transformer"] = option(
        "lstm", "A plain LSTM, AWD-LSTM (Merity, Keskar & Socher 2017) or a transformer decoder."
    )


class Language(Config, LanguageKind):
    """Predict the next word, with the noise between LSTM layers or in the blocks of a transformer."""

    data: types.Text = option(
        "topics",
        "topics (Python's help texts), wikitext-2, a hub id, a folder or a file of text; for the Penn Treebank a "
        "folder.",
    )
    embedding: types.Count = _by_model(
        "Width of the embedding and of the last layer; of a transformer's residual stream.",
        200,
        awd=400,
        transformer=128,
    )
    units: types.Count = _by_model(
        "Width of the other layers; hidden units of a transformer's FFNs.", 200, awd=1150, transformer=512
    )
    layers: types.Count = _by_model("Number of layers.", 2, awd=3)
    heads: types.Count = option(4, "Attention heads of a transformer's block.")
    activation: Literal["relu", "gelu"] = option("relu", "Non-linearity of a transformer's FFNs.")
    place: Literal["ffn", "residual"] = option(
        "ffn",
        "Place of a transformer's noise: the hidden activations of the FFNs, or what attention and FFN add to the "
        "residual stream.",
    )
    words: types.AtLeast3 | None = option(None, "Size of the vocabulary.", shown="all words of the training text")
    bptt: types.AtLeast2 = _by_model("Words a window; of awd the mean.", 35, awd=70, transformer=64)
    batch: types.Count = option(20, "Columns of text side by side, of each process.")
    epochs: types.Count = option(10, "Epochs of the schedule.")
    lr: types.NonNegative = _by_model(
        "Learning rate at its highest: Adam's, down to 0; awd: NT-ASGD's.", 2e-3, awd=30.0
    )
    clip: types.NonNegative = _by_model("Largest norm of the gradient, 0 for none.", 0.25, transformer=1.0)
    weight_decay: types.NonNegative = _by_model("Weight decay.", 0.0, awd=1.2e-6)
    locked: types.Flag = _by_model("One mask for all times of a window.", False, awd=True)
    weight_drop: types.Probability = _by_model("Drop probability of recurrent weights.", 0.0, awd=0.5)
    embedding_drop: types.Probability = _by_model("Drop probability of whole words.", 0.0, awd=0.1)
    activation_penalty: types.NonNegative = _by_model(
        "Factor on the squares of the last layer, after noise.", 0.0, awd=2.0
    )
    temporal_penalty: types.NonNegative = _by_model("Factor on the squares of its changes in time.", 0.0, awd=1.0)

    @model_validator(mode="after")
    def _of_the_model(self) -> Self:
        others = _TRANSFORMER_ONLY if self.model != "transformer" else _LSTM_ONLY
        for name, default in others.items():
            default = getattr(self, default, None) if isinstance(default, str) and default in "pq" else default
            if (value := getattr(self, name, default)) != default:
                raise Refused(name, f"left out, as the model is {self.model}", repr(value))
        if self.model != "transformer":
            if reason := _NOT_IN_LSTM.get(self.method):
                raise Refused("method", f"another for {self.model}, as {reason}", repr(self.method))
        elif self.method in _NOT_IN_LSTM and self.place == "residual":
            raise Refused("place", f"ffn, as {self.method} acts on the hidden activations of an FFN", "'residual'")
        elif METHODS[self.method].is_activation and self.activation != "relu":
            raise Refused("activation", f"left out, as {self.method} takes its place", repr(self.activation))
        elif self.method == "kwinners" and self.activation != "relu":
            raise Refused("activation", f"relu, as kwinners {_AFTER_RELU['kwinners']}", repr(self.activation))
        return self


# Options that one kind of language model alone has a use for, each with the value that changes nothing.
_TRANSFORMER_ONLY = {"heads": 4, "activation": "relu", "place": "ffn"}
_LSTM_ONLY = {"weight_drop": 0.0, "embedding_drop": 0.0} | {
    f"{name}_{place}": name for name in "pq" for place in ("input", "between", "output")
}
_NOT_IN_LSTM = {
    "bridgeout": (fused := "the weights after the noise are inside LSTM layers, out of its reach"),
    "shakeout": fused,
    "kwinners": "the states of an LSTM have both signs, and the largest are not the most active",
    "relu2": (own := "an LSTM has its own activations"),
    "statistical_topk": own,
}

TASKS: dict[str, type[Config]] = {"autoencoder": Autoencoder, "image": Image, "language": Language}
