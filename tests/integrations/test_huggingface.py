"""Models with the conventions of Hugging Face's: values, derivatives and refusals, on stand-ins; real ones are in tests/models."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import LossError, Problem, ProblemError, registry
from curvalg.integrations import huggingface

V, T = 5, 4


class Encoding(UserDict):
    """A mapping that is no dict."""


class StandIn(nn.Module):
    """Embeds tokens and mixes them with those before; counts how often labels came in."""

    outputs = V

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(num_labels=V, problem_type=None, pad_token_id=0, decoder_start_token_id=1)
        vars(self.config).update(config)
        self.embed = nn.Embedding(V, 3)
        self.head = nn.Linear(3, self.config.num_labels)
        self.double()

    def logits(self, input_ids):
        return self.head(self.embed(input_ids).cumsum(1).tanh())

    def forward(self, input_ids, labels=None, use_cache=True, return_dict=False):
        assert (use_cache, return_dict) == (False, True)
        logits = self.logits(input_ids)
        return SimpleNamespace(loss=None if labels is None else self.loss(logits, labels), logits=logits, past=None)


class TinyForCausalLM(StandIn):
    def loss(self, logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class TinyForMaskedLM(StandIn):
    def loss(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TinyForTokenClassification(TinyForMaskedLM):
    pass


class UnshiftedForCausalLM(TinyForMaskedLM):
    pass


class TinyForSequenceClassification(StandIn):
    def logits(self, input_ids):
        return super().logits(input_ids)[:, -1]

    def loss(self, logits, labels):
        if self.config.num_labels == 1:
            self.config.problem_type = "regression"  # the library notes it too
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if self.config.problem_type == "regression":
            return F.mse_loss(logits, labels)
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.cross_entropy(logits, labels.flatten())


class TinyForImageClassification(TinyForSequenceClassification):
    pass


class TinyForConditionalGeneration(TinyForMaskedLM):
    """Its decoder needs tokens; a call with labels makes them of these, as the library does."""

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        if decoder_input_ids is None:
            before = labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)
            decoder_input_ids = torch.cat([torch.ones_like(labels[:, :1]), before], 1)
        logits = self.logits(decoder_input_ids) + self.logits(input_ids).mean(1, keepdim=True)
        return SimpleNamespace(loss=None if labels is None else self.loss(logits, labels), logits=logits)


class Contrastive(StandIn):
    """Its rows belong together; it has no loss for one."""

    def forward(self, input_ids, labels):
        features = self.logits(input_ids).mean(1)
        return SimpleNamespace(loss=F.cross_entropy(features @ features.T, labels), logits_per_row=features)


class ReturnsTuples(TinyForCausalLM):
    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        return (logits,) if labels is None else (self.loss(logits, labels), logits)


def tokens(*lengths):
    ids = torch.randint(0, V, (len(lengths), T))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(T) >= torch.tensor(lengths)[:, None], -100)}


def rows(labels):
    return {"input_ids": torch.randint(0, V, (len(labels), T)), "labels": labels}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_hand(model, data, weights, v):
    """(value, Hessian times v) of Σ w ℓ / Σ w by the loss that the model returns."""
    parameters = list(model.parameters())
    quiet = {"use_cache": False, "return_dict": True} if type(model).forward is StandIn.forward else {}
    total = sum(w * model(**batch, **quiet).loss for w, batch in zip(weights, data)) / sum(weights)
    gradient = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in gradient])
    product = torch.autograd.grad(flat @ v, parameters, allow_unused=True, materialize_grads=True)
    return float(total.detach()), torch.cat([p.flatten() for p in product])


CASES = {
    "causal": (TinyForCausalLM, {}, lambda: [tokens(4, 2), tokens(3)], (4, 2)),
    "masked": (TinyForMaskedLM, {}, lambda: [tokens(4, 2), tokens(3)], (6, 3)),
    "tokens": (TinyForTokenClassification, {}, lambda: [tokens(4, 2), tokens(3)], (6, 3)),
    "decoder": (TinyForConditionalGeneration, {}, lambda: [tokens(4, 2), tokens(3)], (6, 3)),
    "classes": (
        TinyForSequenceClassification,
        {},
        lambda: [rows(torch.tensor([0, 3, 1])), rows(torch.tensor([2, 2]))],
        (3, 2),
    ),
    "images": (
        TinyForImageClassification,
        {},
        lambda: [rows(torch.tensor([[0], [3]])), rows(torch.tensor([2, 2, 4]))],
        (2, 3),
    ),
    "numbers": (
        TinyForSequenceClassification,
        {"num_labels": 1},
        lambda: [rows(torch.randn(3)), rows(torch.randn(2, 1))],
        (3, 2),
    ),
    "vectors": (
        TinyForSequenceClassification,
        {"problem_type": "regression"},
        lambda: [rows(torch.randn(3, V).double()), rows(torch.randn(2, V).double())],
        (3, 2),
    ),
    "several": (
        TinyForSequenceClassification,
        {},
        lambda: [rows(torch.rand(3, V).round().double()), rows(torch.rand(2, V).round().double())],
        (3, 2),
    ),
}


@pytest.mark.parametrize(("kind", "config", "make", "weights"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("loss", ["task", "model"])
def test_value_and_hessian_are_those_of_the_mean_loss_over_all_batches(kind, config, make, weights, loss):
    model, data = kind(**config).eval(), make()
    if loss == "model" and sum(weights) != sum(len(batch["labels"]) for batch in data):
        weights = [len(batch["labels"]) for batch in data]  # the model's mean is one of rows then
    made = huggingface.problem(model, data, loss=loss)
    v = torch.randn(made.size, dtype=torch.float64)
    value, product = by_hand(model, data, weights, v)
    assert made.value() == pytest.approx(value, rel=1e-12)
    assert torch.allclose(registry.build("hessian").lower(made) @ v, product, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["label", "labels"])
@pytest.mark.parametrize("wrap", [dict, Encoding, lambda batch: UserDict(batch)])
def test_batches_are_mappings_of_any_class(name, wrap):
    model, data = TinyForCausalLM().eval(), tokens(4, 2)
    expected = huggingface.problem(model, data).value()
    labels = data.pop("labels")
    assert huggingface.problem(model, wrap({**data, name: labels})).value() == expected
    assert huggingface.problem(model, [wrap({**data, name: labels})]).value() == expected


def test_a_plain_problem_takes_mappings_that_are_no_dicts():
    batch = Encoding(x=torch.randn(3, 2), labels=torch.randn(3, 2))

    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = Named(2, 2)
    expected = F.mse_loss(model(batch["x"]), batch["labels"])
    assert Problem(model, nn.MSELoss(), [batch]).value() == pytest.approx(float(expected.detach()), rel=1e-6)


def test_labels_stay_away_from_the_model():
    seen = []
    model = TinyForCausalLM().eval()
    made = huggingface.problem(model, [tokens(4, 2)])
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    registry.build("hessian").lower(made) @ torch.ones(made.size, dtype=torch.float64)
    assert seen
    assert all("labels" not in keys for keys in seen)


def test_a_model_may_return_tuples():
    data = [tokens(4, 2)]
    model, other = TinyForCausalLM().eval(), ReturnsTuples().eval()
    other.load_state_dict(model.state_dict())
    assert huggingface.problem(other, data).value() == huggingface.problem(model, data).value()
    assert huggingface.problem(other, data, loss="model").value() == pytest.approx(
        huggingface.problem(model, data).value(), rel=1e-12
    )


def test_a_task_can_be_named():
    model, data = UnshiftedForCausalLM().eval(), [tokens(4, 2)]
    with pytest.raises(ProblemError, match=r"task='masked_lm', which gives that value, or loss='model'"):
        huggingface.problem(model, data)
    own = huggingface.problem(model, data, loss="model").value()
    assert huggingface.problem(model, data, "masked_lm").value() == pytest.approx(own, rel=1e-12)
    assert huggingface.problem(model, data, verify=False).value() != pytest.approx(own, rel=1e-3)


def test_a_decoder_gets_padding_for_tokens_that_are_ignored():
    model, batch = TinyForConditionalGeneration().eval(), tokens(4, 4)
    batch["labels"][:, 1] = -100
    made = huggingface.problem(model, batch, verify=False)
    assert made.value() == pytest.approx(model(**batch).loss.item(), rel=1e-12)


def test_a_decoder_with_other_inputs_than_the_library_gives_it_is_seen():
    data = [tokens(4, 2)]
    model = TinyForConditionalGeneration(
        decoder_start_token_id=3
    ).eval()  # the stand-in starts with 1, whatever this says
    with pytest.raises(ProblemError, match="seq2seq_lm makes it"):
        huggingface.problem(model, data)


def test_the_first_look_leaves_no_trace():
    model = TinyForSequenceClassification(num_labels=1)
    model.norm = nn.BatchNorm1d(1).double()
    model.head.register_forward_hook(lambda module, args, output: (model.norm(output[:, -1]), None)[1])
    data = [rows(torch.randn(3))]
    before, state = model.norm.running_mean.clone(), torch.get_rng_state()
    huggingface.problem(model.train(), data)
    assert model.config.problem_type is None
    assert torch.equal(model.norm.running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_decoder_that_drops_out_is_compared_with_the_same_draws():
    class Dropping(TinyForConditionalGeneration):
        def logits(self, input_ids):
            return F.dropout(super().logits(input_ids), 0.5, self.training)

    huggingface.problem(Dropping().train(), [tokens(4, 2)])


def test_a_sum_adds_up():
    model, data = TinyForCausalLM().eval(), [tokens(4, 2), tokens(3)]
    assert huggingface.problem(model, data, reduction="sum").value() == pytest.approx(
        6 * huggingface.problem(model, data).value(), rel=1e-12
    )


def test_tokens_can_be_samples():
    assert huggingface.problem(TinyForCausalLM().eval(), [tokens(4, 2), tokens(3)], samples="position").num_samples == 6


def test_a_model_without_a_known_name_needs_a_task():
    names = r"causal_lm.*masked_lm.*seq2seq_lm.*token_classification.*sequence_classification.*image_classification"
    with pytest.raises(ProblemError, match=f"StandIn.*{names}"):
        huggingface.problem(StandIn(), [tokens(4, 2)])
    with pytest.raises(ProblemError, match=f"{names}.*got 'translation'"):
        huggingface.problem(TinyForCausalLM(), [tokens(4, 2)], task="translation")


@pytest.mark.parametrize(
    ("options", "data", "words"),
    [
        ({"forward": print}, tokens(4, 2), "forward= is made by this function"),
        ({"loss": "focal"}, tokens(4, 2), "got 'focal'"),
        ({"loss": "model", "task": "causal_lm"}, tokens(4, 2), "leave task= out"),
        ({}, {"input_ids": torch.ones(1, 2)}, "no tensor 'labels'"),
        ({}, (torch.ones(1, 2), torch.ones(1)), "batches that are mappings"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, data, words):
    with pytest.raises(ProblemError, match=words):
        huggingface.problem(TinyForCausalLM(), data, **options)


def test_an_unknown_problem_type_is_refused():
    with pytest.raises(ProblemError, match="got 'ranking'"):
        huggingface.problem(TinyForSequenceClassification(problem_type="ranking"), [rows(torch.tensor([0, 1]))])


# -- the loss that a model returns ----------------------------------------------------------------------------------------


def test_rows_that_belong_together_have_a_hessian():
    model, data = Contrastive().eval(), [rows(torch.arange(3)), rows(torch.arange(2))]
    made = huggingface.problem(model, data, loss="model")
    v = torch.randn(made.size, dtype=torch.float64)
    value, product = by_hand(model, data, (3, 2), v)
    assert made.value() == pytest.approx(value, rel=1e-12)
    assert torch.allclose(registry.build("hessian").lower(made) @ v, product, rtol=1e-10, atol=1e-12)
    summed = huggingface.problem(model, data, loss="model", reduction="sum")
    assert summed.value() == pytest.approx(float(sum(model(**batch).loss for batch in data).detach()), rel=1e-12)


@pytest.mark.parametrize("name", ["ggn", "ggn_mc", "residual", "loss_hessian", "fisher", "ggn_diagonal", "kfac"])
def test_matrices_of_outputs_are_refused_where_the_output_is_the_loss(name):
    made = huggingface.problem(TinyForCausalLM().eval(), [tokens(4)], loss="model")
    with pytest.raises(LossError, match=r"TinyForCausalLM returns"):
        registry.build(name).lower(made) @ torch.ones(made.size, dtype=torch.float64)


COVARIANCES = ["covariance", "centered_covariance", "covariance_diagonal"]


@pytest.mark.parametrize("name", COVARIANCES)
def test_covariances_of_batches_of_one_row_are_those_of_the_task(name):
    model = TinyForSequenceClassification().eval()
    data = [rows(torch.tensor([k])) for k in (0, 3, 1)]
    own, task = huggingface.problem(model, data, loss="model"), huggingface.problem(model, data)
    v = torch.randn(own.size, dtype=torch.float64)
    products = [registry.build(name).lower(made) @ v for made in (own, task)]
    assert torch.allclose(*products, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", COVARIANCES)
def test_covariances_of_batches_of_several_rows_are_refused(name):
    made = huggingface.problem(TinyForCausalLM().eval(), [tokens(4, 2)], loss="model")
    with pytest.raises(LossError, match="batches of one row"):
        registry.build(name).lower(made) @ torch.ones(made.size, dtype=torch.float64)


def test_batches_of_one_row_and_of_several_do_not_mix():
    made = huggingface.problem(TinyForCausalLM().eval(), [tokens(4), tokens(3, 2)], loss="model")
    with pytest.raises(ProblemError, match="a later one 2"):
        made.value()


def test_a_model_that_returns_no_loss_is_refused():
    class Silent(TinyForCausalLM):
        def loss(self, logits, labels):
            return None

    with pytest.raises(ProblemError, match="returned no loss"):
        huggingface.problem(Silent().eval(), [tokens(4, 2)], loss="model").value()
