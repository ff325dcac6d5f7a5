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


def transformer(name):
    """A tiny model of transformers by the name of its architecture, and a batch with which it computes a loss."""
    import transformers as t

    tokens = torch.arange(12).reshape(2, 6)
    text = {"input_ids": tokens, "labels": tokens}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    if name == "gpt2":
        config = t.GPT2Config(
            vocab_size=50, n_layer=2, n_head=2, n_embd=16, n_positions=8, bos_token_id=1, eos_token_id=2
        )
        return t.GPT2LMHeadModel(config), text
    if name == "bert":
        return t.BertForMaskedLM(t.BertConfig(vocab_size=50, **small)), text
    if name == "vit":
        drop = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        batch = {"pixel_values": torch.rand(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
        return t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=16, **small, **drop)), batch
    if name == "t5":
        config = t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **ends)
        return t.T5ForConditionalGeneration(config), text
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, num_key_value_heads=2, **small)), text
    if name == "whisper":
        sizes = {
            "d_model": 16,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 8,
            "vocab_size": 50,
        }
        parts = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
        config = t.WhisperConfig(
            **sizes, **parts, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.1, attention_dropout=0.1, **ends
        )
        batch = {"input_features": torch.rand(2, 8, 16), "labels": tokens}
        return t.WhisperForConditionalGeneration(config), batch
    raise KeyError(name)


def image_model(name):
    """A tiny model of timm by the name of its architecture, and a batch of images."""
    from timm.models import convnext, efficientnet, swin_transformer, vgg

    x = torch.rand(2, 3, 32, 32)
    drop = {"drop_rate": 0.1, "num_classes": 3}
    if name == "vgg":
        return vgg.VGG(cfg=[8, "M", 8, "M"], mlp_ratio=0.01, **drop), x
    if name == "efficientnet":
        blocks = efficientnet.decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c16_se0.25"]])
        return efficientnet.EfficientNet(blocks, stem_size=8, num_features=16, **drop), x
    if name == "convnext":
        return convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **drop), x
    if name == "swin":
        sizes = {
            "img_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 8,
            "depths": (2, 1),
            "num_heads": (2, 2),
        }
        return swin_transformer.SwinTransformer(**sizes, proj_drop_rate=0.1, attn_drop_rate=0.1, **drop), x
    raise KeyError(name)
