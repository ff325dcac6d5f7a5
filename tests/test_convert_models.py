"""Conversion of architectures as they are published, tiny and with random weights."""

import copy

import pytest
import torch
from architectures import image_model, transformer

from sparseout import Sparseout, convert_dropout_, revert_, set_q_

TRANSFORMERS = {
    # name: (what is changed, what is skipped, where functional dropout is); "*" stands for a number
    "gpt2": (
        {"transformer.drop", "transformer.h.*.attn.resid_dropout", "transformer.h.*.mlp.dropout"},
        {"transformer.h.*.attn.attn_dropout"},
        set(),
    ),
    "bert": (
        {
            "bert.embeddings.dropout",
            "bert.encoder.layer.*.attention.output.dropout",
            "bert.encoder.layer.*.output.dropout",
        },
        {"bert.encoder.layer.*.attention.self.dropout"},
        set(),
    ),
    "vit": ({"vit.embeddings.dropout", "vit.layers.*.dropout"}, set(), {"vit.layers.*.attention"}),
    "t5": (
        {
            f"{part}.{name}dropout"
            for part in ("encoder", "decoder")
            for name in ("", "block.*.layer.*.", "block.*.layer.*.DenseReluDense.")
        },
        set(),
        {f"{part}.block.*.layer.*.SelfAttention" for part in ("encoder", "decoder")}
        | {"decoder.block.*.layer.*.EncDecAttention"},
    ),
    "llama": (set(), set(), set()),
    "whisper": (
        set(),
        set(),
        {f"model.{part}{name}" for part in ("encoder", "decoder") for name in ("", ".layers.*", ".layers.*.self_attn")}
        | {"model.decoder.layers.*.encoder_attn"},
    ),
}
IMAGES = {
    "vgg": ({"pre_logits.drop", "head.drop"}, set(), set()),
    "efficientnet": (set(), set(), {""}),
    "convnext": ({"stages.*.blocks.*.mlp.drop1", "stages.*.blocks.*.mlp.drop2", "head.drop"}, set(), set()),
    "swin": (
        {f"layers.*.blocks.*.{name}" for name in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")} | {"head.drop"},
        {"layers.*.blocks.*.attn.attn_drop"},
        set(),
    ),
}


def build(name):
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
        model, batch = transformer(name)
        return model, lambda model: model(**batch).loss
    pytest.importorskip("timm")
    model, x = image_model(name)
    return model, lambda model: torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))


def patterns(names):
    return {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}


def seeded(model, loss):
    """The loss, and a number drawn after it: equal only if as many were drawn before."""
    torch.manual_seed(3)
    return loss(model).item(), torch.rand(1).item()


@pytest.mark.filterwarnings("ignore:nothing was ", "ignore:no q was set")  # in models without dropout
@pytest.mark.parametrize("name", [*TRANSFORMERS, *IMAGES])
def test_conversion(name):
    model, loss = build(name)
    model.train()
    original = copy.deepcopy(model)
    fused = copy.deepcopy(model)
    before = seeded(copy.deepcopy(model), loss)

    report = convert_dropout_(model, q=1.0)
    outcome = (patterns(report.changed), patterns(report.skipped), patterns(report.unreached))
    assert outcome == {**TRANSFORMERS, **IMAGES}[name]
    assert {name for name, module in model.named_modules() if isinstance(module, Sparseout)} == set(report.changed)
    assert ("nothing" in str(report)) == (not report.changed)

    # At q = 2 it is the original, in training too, and with the same random numbers; at q = 1 it is not.
    convert_dropout_(fused, q=2.0)
    assert seeded(copy.deepcopy(fused), loss) == before
    if any(module.p > 0 for module in model.modules() if isinstance(module, Sparseout)):
        set_q_(fused, 1.0)
        assert seeded(copy.deepcopy(fused), loss) != before

    # A training step
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss(model).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    optimizer.step()

    # Checkpoints fit both ways, and evaluation is the original's.
    original.load_state_dict(model.state_dict(), strict=True)
    assert seeded(copy.deepcopy(original).eval(), loss) == seeded(copy.deepcopy(model).eval(), loss)
    model.load_state_dict(original.state_dict(), strict=True)

    revert_(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    assert seeded(copy.deepcopy(model), loss) == seeded(copy.deepcopy(original), loss)


@pytest.mark.parametrize("fused", [True, False])
def test_swins_attention_is_found_on_both_paths(fused):
    layers = pytest.importorskip("timm.layers")
    layers.set_fused_attn(fused, experimental=fused)
    try:
        report = convert_dropout_(image_model("swin")[0], q=1.5)
    finally:
        layers.set_fused_attn(True, experimental=False)
    assert patterns(report.skipped) == IMAGES["swin"][1]
    assert set(report.skipped.values()) == {
        f"on attention probabilities: {'according to its name' if fused else 'softmax feeds it'}"
    }
