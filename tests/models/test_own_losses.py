"""Losses that models of a real library return themselves."""

from __future__ import annotations

import copy

import pytest
import torch

from curvalg import LossError, ProblemError, registry
from curvalg.integrations import huggingface
from tests.support.models.by_hand import InDouble, in_double
from tests.support.models.zoo import SMALL, V, stirred, texts


def double_backward(model, batches, weights, v):
    """The Hessian of Σ w ℓ / Σ w times v, by two backward passes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        total = sum(w * model(**batch).loss for w, batch in zip(weights, batches)) / sum(weights)
        gradient = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.flatten() for g in gradient])
        product = torch.autograd.grad(flat @ v, parameters, allow_unused=True, materialize_grads=True)
    return total.item(), torch.cat([p.flatten() for p in product])


def check(model, batches, weights, reduction="mean"):
    made = huggingface.problem(model, batches, loss="model", reduction=reduction)
    v = torch.randn(made.size, dtype=torch.float64)
    value, expected = double_backward(model, batches, weights, v)
    scale = sum(weights) if reduction == "sum" else 1  # of ones
    assert made.value() == pytest.approx(scale * value, rel=1e-12)
    product = registry.build("hessian").lower(made) @ v
    assert float((product - scale * expected).norm() / (scale * expected).norm()) <= 1e-10


def routed():
    """A Mixtral whose loss has a term of its router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SMALL,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    config._experts_implementation = "eager"
    return in_double(stirred(MixtralForCausalLM(config)))


def clip():
    """Pictures and texts that belong together: the loss compares all rows of a batch."""
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, "projection_dim": 4}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return in_double(stirred(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))))


def pairs(rows):
    ids = torch.randint(3, V, (rows, 4))
    ids[:, -1] = 2  # the end, where the text is read off
    pictures = torch.randn(rows, 3, 8, 8, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures, "return_loss": True}


def test_a_router_is_not_left_out():
    model, batches = routed(), texts()
    with pytest.raises(ProblemError, match=r"MixtralForCausalLM returns the loss .* causal_lm makes it .*loss='model'"):
        huggingface.problem(model, batches)
    check(model, batches, [len(batch["labels"]) for batch in batches])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_compares_rows(reduction):
    batches = [pairs(2), pairs(3)]
    check(clip(), batches, (2, 3) if reduction == "mean" else (1, 1), reduction)


def test_a_head_for_answers():
    from transformers import BertConfig, BertForQuestionAnswering

    model = in_double(stirred(BertForQuestionAnswering(BertConfig(**SMALL))))
    batches = [
        {
            "input_ids": batch["input_ids"],
            "start_positions": torch.ones(n, dtype=torch.long),
            "end_positions": torch.arange(n),
        }
        for batch in texts()
        for n in [len(batch["input_ids"])]
    ]
    check(model, batches, (2, 3))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "lora"])
def test_the_own_loss_has_the_hessian_of_the_task(name, real):
    model = real(name)
    own, task = huggingface.problem(model.model, [model.batches[0]], loss="model"), model.problem([model.batches[0]])
    v = torch.randn(own.size, dtype=torch.float64)
    first, second = (registry.build("hessian").lower(made) @ v for made in (own, task))
    assert float((first - second).norm() / second.norm()) <= 1e-10
    with pytest.raises(LossError, match="loss of output and target"):
        registry.build("ggn").lower(own)


def test_covariances_take_batches_of_one_row(real):
    model = real("distilbert")
    rows = [
        {key: value[k : k + 1] for key, value in batch.items()}
        for batch in model.batches
        for k in range(len(batch["labels"]))
    ]
    own = huggingface.problem(model.model, rows, loss="model")
    v = torch.randn(own.size, dtype=torch.float64)
    expected = model.covariance(v)
    product = registry.build("covariance").lower(own) @ v
    assert float((product - expected).norm() / expected.norm()) <= 1e-10
    with pytest.raises(LossError, match="batches of one row"):
        registry.build("covariance").lower(huggingface.problem(model.model, model.batches, loss="model"))


def test_a_decoder_that_does_not_shift_is_told_from_one_that_does():
    from transformers import BartConfig, BartForCausalLM

    layers = {"decoder_layers": 1, "decoder_ffn_dim": 12, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=V, d_model=8, max_position_embeddings=16, **layers, pad_token_id=0, decoder_start_token_id=2
    )
    model, batches = in_double(stirred(BartForCausalLM(config))), texts()
    with pytest.raises(ProblemError, match="task='masked_lm'"):
        huggingface.problem(model, batches)
    assert huggingface.problem(model, batches[0], task="masked_lm").value() == pytest.approx(
        model(**batches[0]).loss.item(), rel=1e-12
    )


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_experts_in_the_precision_that_models_come_in(dtype, error):
    """Torch multiplies all experts at once there, by a function that exists for no other precision."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**SMALL, "intermediate_size": 16}  # in steps of 16 bytes, as that function wants
    model = stirred(
        MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=3))
    )
    model, batches = model.eval().to(dtype), texts()
    made = huggingface.problem(model, batches)
    product = registry.build("hessian").lower(made) @ torch.ones(made.size, dtype=made.dtype)
    exact = copy.deepcopy(model)
    exact.config._experts_implementation = "eager"
    reference = huggingface.problem(in_double(exact), batches)
    expected = registry.build("hessian").lower(reference) @ torch.ones(made.size, dtype=torch.float64)
    assert made.value() == pytest.approx(reference.value(), rel=error)
    assert float((product.double() - expected).norm() / expected.norm()) <= error


def test_double_precision_is_that_of_the_reference():
    """Libraries cast norms and losses to single precision, which the zoo undoes: else ten digits could not be compared."""
    with InDouble():
        assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float64
        assert torch.ones(1).to(torch.float32).dtype == torch.float64
