"""KFAC and EKFAC of models of real libraries, against gradients and hooks of plain torch."""

from __future__ import annotations

import re

import pytest
import torch

from curvalg import Identity, ProblemError, inverse, registry
from tests.support.models import others, zoo
from tests.support.models.kronecker import (
    SEED,
    added,
    affine,
    draws_of,
    experts,
    gradients,
    groups_of,
    names_of,
    table,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*have no Kronecker factors and get a diagonal")

NAMES = [maker.__name__ for maker in (*zoo.TRANSFORMERS, *others.OTHERS)]
ERROR = 1e-8
SAMPLES = 2
LARGE = 1200
"""Numbers in the largest block that is made dense."""

DISTINCT = 1e-6
"""The gap between eigenvalues, relative to the largest, from which on they have eigenvectors of their own."""

FORCES = tuple(
    f"potential.potentials.nnp.neural_networks.atomics.{atom}.{layer}.weight"
    for atom in "HO"
    for layer in ("layers.0", "final_layer")
)
"""Energies and forces both have these in them: once as they are and once in a derivative."""

WITHOUT = {
    "gpt2": ("transformer.wte.weight",),
    "mamba": ("backbone.embeddings.weight", "backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D"),
    "t5": (
        "shared.weight",
        *(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")),
    ),
    "bart": ("model.shared.weight",),
    "whisper": ("model.decoder.embed_tokens.weight",),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
    "torch_geometric": ("second.eps",),
    "torchani": FORCES,
}
"""What has no Kronecker factors, beside normalisations: tables at both ends, what is no matrix, biases of attention."""

REFUSED = {"torchani": (FORCES[0], FORCES[2])}
"""What of that has more than 1024 numbers."""


def build(name: str, **options):
    return registry.build(name, fisher="mc", samples=SAMPLES, seed=SEED, **options)


def without_factors(model: torch.nn.Module, name: str) -> set[str]:
    """What has no Kronecker factors: scales and shifts of normalisations, and what is listed."""
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    return {n for n, p in model.named_parameters() if p.requires_grad and id(p) in norms} | {*WITHOUT.get(name, ())}


def named(error: ProblemError) -> set[str]:
    """The parameters that an error is about."""
    return set(re.findall(r"(?:factors for|;) ([\w.]+) \(", str(error)))


def off(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp_min(1e-300))


class Case:
    """A model of the zoo with the gradients of its draws, for all parameters that are in blocks small enough."""

    def __init__(self, name, real):
        self.real = real(name)
        self.rest = {"rest": "diagonal"} if name in REFUSED else {}
        self.whole = self.real.problem()
        self.gradients = gradients(self.real, draws_of(self.whole, SAMPLES))
        self.sizes = {n: g.shape[1] for n, g in self.gradients.items()}
        self.groups = groups_of(self.real.model)
        self.small = [group for group in self.groups if sum(self.sizes[n] for n in group) <= LARGE]

    def problem(self):
        """Of the parameters in small blocks."""
        names = {n for group in self.small for n in group}
        every = len(names) == len(self.sizes)
        return self.whole if every else self.real.problem(params=[n for n in self.sizes if n in names])

    def places(self, problem, group):
        """The numbers of a group in the vector of a problem."""
        return torch.cat([torch.arange(problem.size)[problem.layout.slices[n]] for n in group])

    def outer(self, group):
        """Σ g gᵀ of a group."""
        g = torch.cat([self.gradients[n] for n in group], 1)
        return g.T @ g


@pytest.fixture(scope="module")
def cases():
    """Those that were made."""
    return {}


@pytest.fixture
def case(real, cases):
    """name -> its case, made once."""

    def made(name):
        if name not in cases:
            cases[name] = Case(name, real)
        return cases[name]

    return made


# -- what has factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_factors_is_named_and_nothing_else(name, real):
    """Asked again without them, since some show themselves in the first row and some only where rows meet."""
    model = real(name)
    left, found = names_of(model), set()
    while left:
        try:
            build("kfac", rest="refuse").lower(model.problem(params=left)).prepare()
            break
        except ProblemError as error:
            found |= named(error)
            assert found
            left = [n for n in left if n not in found]
    assert found == without_factors(model.model, name)


@pytest.mark.parametrize("matrix", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_too_large_for_a_block_is_refused_by_name(name, matrix, real):
    with pytest.raises(ProblemError) as caught:
        build(matrix).lower(real(name).problem()).prepare()
    assert named(caught.value) == set(REFUSED[name])


def larger(name):
    """A model in which normalisations are a small share, in the problem of a batch; and its table at both ends."""
    import transformers as library

    from curvalg.integrations import huggingface

    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.arange(12).reshape(2, 6) + 3
    batch = {"input_ids": ids, "labels": ids}
    model, tied = {
        "gpt2": lambda: (
            library.GPT2LMHeadModel(library.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4)),
            {"transformer.wte.weight"},
        ),
        "llama": lambda: (library.LlamaForCausalLM(library.LlamaConfig(vocab_size=99, **wide)), set()),
        "t5": lambda: (
            library.T5ForConditionalGeneration(
                library.T5Config(
                    vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
                )
            ),
            {"shared.weight"},
        ),
        "bert": lambda: (
            library.BertForMaskedLM(library.BertConfig(vocab_size=99, **wide)),
            {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
        ),
        "vit": lambda: (
            library.ViTForImageClassification(library.ViTConfig(image_size=16, patch_size=8, num_labels=3, **wide)),
            set(),
        ),
    }[name]()
    if name == "vit":
        batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    return huggingface.problem(model.eval(), [batch]), tied


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert", "vit"])
def test_nearly_all_numbers_have_factors(name):
    problem, tied = larger(name)
    sizes = dict(zip(problem.layout.names, problem.layout.sizes, strict=True))
    with pytest.raises(ProblemError) as caught:
        build("kfac", rest="refuse").lower(problem).prepare()
    others = sum(n for name, n in sizes.items() if name not in tied)
    assert tied <= named(caught.value)
    assert sum(sizes[name] for name in named(caught.value) - tied) <= 0.05 * others


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_a_large_table_at_both_ends_is_refused_alone_and_has_a_diagonal(name):
    problem, tied = larger(name)
    with pytest.raises(ProblemError, match="several ways at once") as caught:
        build("kfac").lower(problem).prepare()
    assert named(caught.value) == tied
    operator = build("kfac", rest="diagonal").lower(problem)
    assert bool((operator @ torch.ones(problem.size)).isfinite().all())


# -- blocks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_traces_are_the_square_norms_of_the_gradients_of_draws(name, case):
    found = case(name)
    diagonal = build("ekfac", **found.rest).lower(found.whole).exact("diagonal")
    for group in found.groups:
        expected = sum(found.gradients[n].square().sum() for n in group)
        assert off(diagonal[found.places(found.whole, group)].sum(), expected) <= ERROR, group


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_those_of_the_gradients_in_the_eigenbasis_of_kfac(name, case):
    """Where eigenvalues of KFAC are equal, what is in their space, and how much, is all that can be said."""
    found = case(name)
    problem = found.problem()
    kfac, ekfac = (build(matrix, **found.rest).lower(problem).to_dense() for matrix in ("kfac", "ekfac"))
    exact = without_factors(found.real.model, name)
    for group in found.small:
        at = found.places(problem, group)
        k, e, g = kfac[at][:, at], ekfac[at][:, at], found.outer(group)
        if found.rest and not exact.isdisjoint(group):
            assert off(e, g.diagonal().diag()) <= ERROR, group
            assert off(k, g.diagonal().diag()) <= ERROR, group
        elif not exact.isdisjoint(group):
            assert off(e, g) <= ERROR, group
            assert off(k, g) <= ERROR, group
        else:
            assert misfit(k, e, g) <= ERROR * e.norm(), group
        for matrix in (kfac, ekfac):
            matrix[at[:, None], at] = 0
    assert not kfac.any()
    assert not ekfac.any()


def misfit(k, e, g):
    """How far E is from V diag(Vᵀ G V) Vᵀ in the eigenvectors V of K, by spaces of eigenvalues that are nearly the same."""
    values, v = torch.linalg.eigh(k)
    ends = [0, *((values.diff() > DISTINCT * values[-1]).nonzero().flatten() + 1).tolist(), len(values)]
    rotated, moments = v.T @ e @ v, ((v.T @ g) * v.T).sum(1)
    worst = torch.zeros(())
    for start, stop in zip(ends, ends[1:], strict=False):
        inside = slice(start, stop)
        missing = rotated[inside].clone()
        missing[:, inside] = 0
        trace = rotated.diagonal()[inside].sum() - moments[inside].sum()
        worst = max(worst, missing.norm(), trace.abs())
    return worst


@pytest.mark.parametrize("matrix", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", NAMES)
def test_damped_inverses_are_inverses(name, matrix, case):
    found = case(name)
    damped = build(matrix, **found.rest) + 0.1 * Identity
    b = torch.randn(found.whole.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = inverse(damped).lower(found.whole) @ b
    assert off(damped.lower(found.whole) @ x, b) <= ERROR


# -- factors by hand --------------------------------------------------------------------------------------------------------

LINEAR = {
    "gpt2": ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj"),
    "llama": ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"),
    "mistral": ("model.layers.0.self_attn.q_proj", "lm_head"),
    "mixtral": ("model.layers.1.self_attn.o_proj", "lm_head"),
    "mamba": (
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.0.mixer.x_proj",
        "backbone.layers.0.mixer.out_proj",
    ),
    "t5": ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"),
    "bart": ("model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"),
    "whisper": ("model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.q_proj"),
    "bert": ("bert.encoder.layer.0.attention.self.query", "cls.predictions.transform.dense"),
    "bert_regression": ("bert.pooler.dense", "classifier"),
    "bert_several_labels": ("bert.encoder.layer.1.output.dense", "classifier"),
    "roberta": ("roberta.encoder.layer.0.intermediate.dense", "classifier"),
    "distilbert": ("distilbert.transformer.layer.0.attention.q_lin", "pre_classifier"),
    "vit": ("vit.layers.0.attention.q_proj", "classifier"),
    "lora": tuple(
        f"base_model.model.model.layers.0.self_attn.{which}_proj.lora_{side}.default" for which in "qv" for side in "AB"
    ),
    "minilm": ("classifier",),
    "torch_geometric": ("second.nn.0", "second.nn.2", "head"),
    "timm": ("fc",),
    "timm_transformer": ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "head"),
    "lightning": ("body.1", "body.3"),
}
"""Layers x ↦ W x + b: packed projections, such that see words, patches, nodes or whole rows, and such of an encoder."""

TABLES = {
    "gpt2": ("transformer.wpe", lambda given: given[0]),
    "bert": ("bert.embeddings.position_embeddings", lambda given: given[0]),
    "roberta": ("roberta.embeddings.position_embeddings", lambda given: given[0]),
    "distilbert": ("distilbert.embeddings.position_embeddings", lambda given: given[0]),
    "llama": ("model.embed_tokens", lambda given: given[0]),
    "bart": ("model.decoder.embed_positions", lambda given: torch.arange(given[0].shape[1]) + 2),
    "whisper": ("model.decoder.embed_positions", lambda given: torch.arange(given[0].shape[1])),
}
"""Tables of positions and of words, and what is picked from them."""

ADDED = {"vit": "vit.embeddings.position_embeddings", "timm_transformer": "pos_embed"}
"""Tables of positions that are added as they are."""


def block_of(real, params):
    """The dense block of KFAC, and its problem."""
    problem = real.problem(params=list(params))
    return build("kfac").lower(problem).to_dense()


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in LINEAR.items() for path in paths])
def test_linear_layers_have_the_factors_that_hooks_see(name, path, real):
    model = real(name)
    params = [n for n in names_of(model) if n.rpartition(".")[0] == path]
    assert off(block_of(model, params), affine(model, path, draws_of(model.problem(), SAMPLES))) <= ERROR


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_have_the_factors_of_what_is_picked(name, real):
    model, (path, index) = real(name), TABLES[name]
    expected = table(model, path, draws_of(model.problem(), SAMPLES), index)
    assert off(block_of(model, [f"{path}.weight"]), expected) <= ERROR


@pytest.mark.parametrize("name", sorted(ADDED))
def test_tables_that_are_added_have_one_factor_for_all_positions(name, real):
    model, parameter = real(name), ADDED[name]
    assert off(block_of(model, [parameter]), added(model, parameter, draws_of(model.problem(), SAMPLES))) <= ERROR


@pytest.mark.parametrize("layer", [0, 1])
def test_each_expert_has_factors_of_the_tokens_that_it_sees(layer, real):
    model = real("mixtral")
    path = next(n for n, m in model.model.named_modules() if n.endswith(f"{layer}.mlp.experts"))
    for name, blocks in experts(model, path, draws_of(model.problem(), SAMPLES)).items():
        assert off(block_of(model, [f"{path}.{name}"]), torch.block_diag(*blocks)) <= ERROR
