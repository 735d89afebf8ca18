"""Models of transformers as the suite takes them: random weights, one tensor of inputs, classes on axis 1."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

LEGACY = "tests.support.models.torchvision"


class Library(nn.Module):
    """The logits of a model of transformers, classes on axis 1; an encoder-decoder gets the same tokens on both sides.

    Args:
        name: of its class.
        config: of its configuration, by keyword.
    """

    def __init__(self, name: str, **config: Any) -> None:
        super().__init__()
        make_importable()
        import transformers

        kind: Any = getattr(transformers, name)
        self.model = kind(kind.config_class(**config)).eval()
        takes = inspect.signature(self.model.forward).parameters
        self.keys = [key for key in ("input_ids", "pixel_values", "decoder_input_ids") if key in takes]
        self.options = {"use_cache": False} if "use_cache" in takes and "pixel_values" not in takes else {}

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict.fromkeys(self.keys, inputs), **self.options).logits
        return logits.transpose(1, 2) if logits.ndim == 3 else logits


def make_importable() -> None:
    """Transformers imports torchvision, which may not fit the build of torch; nothing of it is used."""
    from importlib import import_module

    import_module(LEGACY).make_importable()


def language(
    name: str, vocabulary: int, shape: tuple[int, int], **config: Any
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A language model on random tokens, with the next or the masked ones as random classes."""
    net = Library(name, vocab_size=vocabulary, **config)
    return net, (torch.randint(3, vocabulary, shape), torch.randint(3, vocabulary, shape))


WIDE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def gpt2() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Four layers of width 192, vocabulary 2000 whose table is shared by both ends, 8 sequences of 32 tokens."""
    return language("GPT2LMHeadModel", 2000, (8, 32), n_embd=192, n_layer=4, n_head=4, n_positions=32)


def llama() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Four layers of width 192 with two heads of keys, vocabulary 2000, 8 sequences of 32 tokens."""
    return language("LlamaForCausalLM", 2000, (8, 32), **WIDE, num_key_value_heads=2)


def bert() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Four layers of width 192, vocabulary 2000 whose table is shared by both ends, 8 sequences of 32 tokens."""
    return language("BertForMaskedLM", 2000, (8, 32), **WIDE, max_position_embeddings=32)


def t5() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Three layers of width 192 on either side, vocabulary 2000 whose table is shared, 8 pairs of 32 tokens."""
    return language(
        "T5ForConditionalGeneration", 2000, (8, 32), d_model=192, d_kv=48, d_ff=512, num_layers=3, num_heads=4
    )


def vit() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Four layers of width 192, 10 classes, 16 images of 32 x 32 in patches of 4 x 4."""
    net = Library("ViTForImageClassification", **WIDE, image_size=32, patch_size=4, num_labels=10)
    return net, (torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))


def gpt2_124m() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """GPT-2 as it is: 124M parameters, one sequence of 512 tokens."""
    return language("GPT2LMHeadModel", 50257, (1, 512))


def tiny_gpt2() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """One layer of width 8, vocabulary 13, 8 sequences of 5 tokens."""
    return language(
        "GPT2LMHeadModel", 13, (8, 5), n_embd=8, n_layer=1, n_head=2, n_positions=5, bos_token_id=1, eos_token_id=2
    )


def tiny_vit() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """One layer of width 8, 3 classes, 8 images of 8 x 8."""
    net = Library("ViTForImageClassification", **TINY, image_size=8, patch_size=4, num_labels=3)
    return net, (torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,)))
