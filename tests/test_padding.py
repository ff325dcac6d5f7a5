"""A batch that is mostly padding, in a tiny BERT: what is counted are the rows of the tokens, exactly."""

import pytest
import torch
from architectures import let_torchvision_import, transformer
from torch import nn

from sparseout import SparsityController, SparsityMonitor, convert_dropout_, measures, row_mask
from sparseout._utils.modules import is_noise, named_modules

LENGTHS = (1, 2, 3, 2)  # of 20 positions: 90% padding


@pytest.fixture(scope="module")
def bert():
    let_torchvision_import()
    torch.manual_seed(0)
    model = transformer("bert")[0].bert.double()
    convert_dropout_(model, q=2.0, scale="matched")
    return model


def padded():
    mask = torch.arange(20) < torch.tensor(LENGTHS)[:, None]
    assert mask.double().mean() == 0.1
    return {"input_ids": torch.randint(1, 50, (4, 20)) * mask, "attention_mask": mask.long()}


def seen(model, batch):
    """The rows of tokens in what activations put out and noise is given, by module, in a pass with `batch`."""
    rows, handles, keep = {}, [], batch["attention_mask"].bool()
    for name, module in named_modules(model):
        if is_noise(module) or not list(module.children()):

            def hook(module, args, output, name=name):
                x = args[0] if is_noise(module) else output
                if x.shape[:2] == keep.shape and x.ndim == 3:
                    rows[name] = x[keep].detach()

            handles.append(module.register_forward_hook(hook))
    with row_mask(batch["attention_mask"]):
        model(**batch)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_monitor_counts_the_tokens(bert, mode):
    bert.train(mode == "train")
    with SparsityMonitor(bert, eps=0.001) as monitor:
        rows = seen(bert, padded())
    report = monitor.report()
    records = [r for r in report if r["module"] in rows]
    assert len(records) == 2 * 7  # modules: two activations, four noises in the blocks and one of the embeddings
    for record in records:
        layer = nn.Identity()
        with SparsityMonitor(layer, [""], eps=0.001) as alone:
            layer(rows[record["module"]])
        expected = alone.report()[record["axis"] == "lifetime"]
        assert expected["rows"] == sum(LENGTHS)
        for key in set(expected) - {"module", "tensor", "mode", "noise", "noise_error"}:
            assert record[key] == expected[key], (record["module"], key)
    assert report.unmasked == []


@pytest.mark.parametrize(("measure", "eps"), [("hoyer", 0.0), ("density", 0.01)])
def test_a_controller_counts_the_tokens(bert, measure, eps):
    controller = SparsityController(bert.train(), 0.5, measure, per_layer=True, every=1, eps=eps)
    rows = seen(bert, padded())
    controller.step()
    controller.detach()
    options = {"eps": eps} if eps else {}
    assert len(controller.measured) == 5
    for name, value in controller.measured.items():
        expected = getattr(measures, measure)(rows[name], **options)
        assert value == pytest.approx(expected.nanmean().item(), rel=1e-12)  # an attention of one token may be dropped
    assert not any("row mask" in sentence for sentence in controller.report())


def test_they_are_those_of_the_texts_without_padding(bert):
    batch = padded()
    with SparsityMonitor(bert.eval()) as monitor, row_mask(batch["attention_mask"]):
        bert(**batch)
    with SparsityMonitor(bert) as alone:
        for ids, length in zip(batch["input_ids"], LENGTHS, strict=True):
            bert(ids[None, :length])
    for record, expected in zip(monitor.report(), alone.report(), strict=True):
        for key in ("hoyer", "hoyer_live", "density", "rows", "dead_units"):
            assert record[key] == pytest.approx(expected[key], rel=1e-9)
