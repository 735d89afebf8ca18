r"""
A transformer on text
=====================

After this page you can compute the curvature of a language model: which of its options decide what a sample is, why that
matters for gradient covariances and not for Hessians, and where in a transformer the curvature sits. The text comes with
Python, and the model is trained in a few seconds.
"""

# %%
# Text and model
# --------------
# The first two thirds of the Zen of Python, in sequences of sixteen characters, each of which has to predict the next one.
# The transformer has two layers, of PyTorch's own kind.

import codecs
import contextlib
import io

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from curvalg import Problem, registry, restrict
from curvalg.estimate import diagonal, eigsh, spectral_density, trace
from curvalg.losses import CrossEntropy

with contextlib.redirect_stdout(io.StringIO()):
    import this

text = codecs.decode(this.s, "rot13")
characters = sorted(set(text))
code = torch.tensor([characters.index(c) for c in text])
T, WIDTH = 16, 16
starts = torch.arange(0, len(code) - T - 1, T)[:36]
X = torch.stack([code[s : s + T] for s in starts])
y = torch.stack([code[s + 1 : s + T + 1] for s in starts])
print(repr(text[:40]), f"{len(characters)} characters, {len(X)} sequences of {T}")


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(len(characters), WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(T, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, len(characters))

    def forward(self, codes):
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)  # True: not to be looked at
        x = self.token(codes) + self.place
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(x)


torch.manual_seed(0)
model = Transformer()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(40):
    for rows in torch.randperm(len(X)).split(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(X[rows]).flatten(0, 1), y[rows].flatten()
        ).backward()
        optimizer.step()

# %%
# A problem with sequences
# ------------------------
# The outputs have the shape (sequences, positions, characters); ``CrossEntropy(class_axis=-1)`` says where the classes are.
# The mean is over all characters. ``samples`` says what one sample is: a row of the batch, here a sequence, or a position,
# here a character.

model = model.double().eval()
problem = Problem(model, CrossEntropy(class_axis=-1), (X, y), samples="position")
by_sequence = Problem(model, CrossEntropy(class_axis=-1), (X, y), samples="item")
print(problem, f"loss {problem.value():.3f}")
print(f"{problem.num_samples} characters, {by_sequence.num_samples} sequences")

# %%
# What a sample is
# ----------------
# Hessian and GGN are sums over characters, whatever is called a sample. A gradient covariance is not: the gradients of what
# belongs to one sample are added before they are squared.

v = torch.randn(
    problem.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)
terms = {name: registry.build(name) for name in ("hessian", "ggn", "covariance")}
for name in ("hessian", "ggn"):
    torch.testing.assert_close(
        terms[name].lower(problem) @ v, terms[name].lower(by_sequence) @ v
    )

spectra = {
    "by character": terms["covariance"]
    .lower(problem)
    .exact("eigh")
    .eigenvalues.flip(0),
    "by sequence": terms["covariance"]
    .lower(by_sequence)
    .exact("eigh")
    .eigenvalues.flip(0),
}
sums = {name: float(values.sum()) for name, values in spectra.items()}
for name, values in spectra.items():
    print(
        f"covariance {name}: {len(values)} eigenvalues above rounding, trace "
        f"{sums[name]:.1f}"
    )

# %%
# Its rank is at most the number of samples. The trace by sequence cannot be larger than that by character (Cauchy-Schwarz),
# and would be the same if all characters of a sequence pulled the same way. If their gradients were uncorrelated it would be
# smaller by a factor of :math:`T`, and that is about what is found: given what the model knows, the next character is news.

assert len(spectra["by sequence"]) <= by_sequence.num_samples
assert len(spectra["by character"]) <= problem.num_samples
assert sums["by sequence"] <= sums["by character"]
print(f"ratio of the traces {sums['by character'] / sums['by sequence']:.1f}, T = {T}")
assert 0.5 < sums["by character"] / sums["by sequence"] / T < 2

# %%
# Hessian and GGN
# ---------------
# The large eigenvalues of the Hessian follow those of the GGN. What the GGN cannot show is the negative curvature at the
# other end, which is present but weak. The outliers of a spectral density are eigenvalues that were computed one by one,
# here the largest twelve.

hessian, ggn = terms["hessian"].lower(problem), terms["ggn"].lower(problem)
ends = {"hessian": hessian, "ggn": ggn}
density = spectral_density(hessian, probes=2, steps=40, outliers=12)
top = {
    "hessian": density.outliers.flip(0),
    "ggn": eigsh(ggn, 12, tol=1e-3).eigenvalues.flip(0),
}
lowest = float(eigsh(hessian, 1, which="SA", tol=1e-2).eigenvalues[0])
apart = float(((top["hessian"] - top["ggn"]).abs() / top["ggn"]).max())
print(
    f"the top eigenvalues differ by at most {apart:.0%}; the lowest of the Hessian is "
    f"{lowest:.2f}"
)
assert apart < 0.3
assert -0.2 * top["hessian"][0] < lowest < 0

near_zero = density.cdf(1.0) - density.cdf(-1.0)
print(f"{near_zero:.1%} of the eigenvalues are between -1 and 1")
assert near_zero > 0.9

# %%
# Where the curvature is
# ----------------------
# :func:`~curvalg.estimate.diagonal` estimates the diagonal of a matrix by products alone. Its sums over groups of parameters
# are the traces of their blocks; for a block that is small enough to be exact the two agree.

parts = {
    "embeddings": ("token.", "place"),
    "attention 1": ("layers.0.self_attn.",),
    "feed-forward 1": ("layers.0.linear",),
    "attention 2": ("layers.1.self_attn.",),
    "feed-forward 2": ("layers.1.linear",),
    "norms": ("layers.0.norm", "layers.1.norm"),
    "head": ("head.",),
}


def belongs(name, part):
    return name.startswith(parts[part])


traces = {}
for which, op in ends.items():
    entries = diagonal(op, products=60).value
    entries = problem.layout.unflatten(entries)
    traces[which] = {
        part: sum(float(entries[name].sum()) for name in entries if belongs(name, part))
        for part in parts
    }
shapes = problem.layout.shapes
sizes = {
    part: sum(shape.numel() for name, shape in shapes.items() if belongs(name, part))
    for part in parts
}
for part, size in sizes.items():
    print(
        f"{part:15} {size:5} parameters, trace of GGN {traces['ggn'][part]:6.1f}, of "
        f"Hessian {traces['hessian'][part]:6.1f}"
    )
assert sum(sizes.values()) == problem.size

norms = restrict(terms["ggn"], "layers.*.norm*").lower(problem).exact("trace")
whole = trace(ggn)
print(
    f"norms exactly {norms:.2f}; whole trace {whole.value:.0f} ± {whole.error:.0f}, "
    f"summed {sum(traces['ggn'].values()):.0f}"
)
assert abs(traces["ggn"]["norms"] / norms - 1) < 0.2
assert abs(sum(traces["ggn"].values()) / whole.value - 1) < 0.1

# %%
# The first attention layer holds the most, a third of the trace in an eighth of the parameters; for each of its parameters
# the norms hold as much. The feed-forward layers, half of the parameters, hold less than their share, and each part of the
# second layer less than the same part of the first. Hessian and GGN hardly differ in this. In the weights of the head they
# are the same, since the outputs are linear in them.

share = {part: traces["ggn"][part] / whole.value for part in parts}
assert max(share, key=share.get) == "attention 1"
assert share["attention 1"] > 2 * sizes["attention 1"] / problem.size
assert (
    share["feed-forward 1"] + share["feed-forward 2"]
    < (sizes["feed-forward 1"] + sizes["feed-forward 2"]) / problem.size
)
assert share["attention 2"] < share["attention 1"]
assert share["feed-forward 2"] < share["feed-forward 1"]
w = torch.zeros(problem.size, dtype=torch.float64)
at = problem.layout.slices["head.weight"]
w[at] = v[at]
torch.testing.assert_close((hessian @ w)[at], (ggn @ w)[at])

# %%
# Left: the density of the Hessian's eigenvalues with the outliers. Middle: the covariance's eigenvalues by either meaning of
# a sample; by sequence they end with the last of the sequences. Right: the traces, and as dots the share of the parameters.

blue, red, grey = "#0b3c5d", "#c8553d", "#9aa3ad"
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(9.5, 3.9), layout="constrained", width_ratios=(1, 1, 1.25)
)
floor = 0.1 / (problem.size * density.width)
left.fill_between(
    density.grid, floor, density.density.clamp_min(floor), color="#c9d6e2"
)
left.plot(density.grid, density.density.clamp_min(floor), color=blue, linewidth=1)
left.plot(
    top["hessian"],
    np.full(12, 3 * floor),
    "v",
    color=red,
    markersize=5,
    label="Hessian, top 12",
)
left.plot(
    top["ggn"],
    np.full(12, 1.5 * floor),
    "^",
    color=grey,
    markersize=5,
    label="GGN, top 12",
)
left.set(yscale="log", xlabel="eigenvalue", ylabel="density")
left.set_title("Spectrum of the Hessian", loc="left", color=blue, fontsize=11)
for (name, values), colour, dash in zip(
    spectra.items(), (blue, red), ("-", "--"), strict=True
):
    middle.loglog(
        np.arange(1, len(values) + 1),
        values,
        dash,
        color=colour,
        linewidth=2,
        label=name,
    )
middle.set(xlabel="eigenvalue number", ylabel="eigenvalue", ylim=(1e-4, None))
middle.set_title("Covariance of gradients", loc="left", color=blue, fontsize=11)
place = np.arange(len(parts))
for which, shift, colour in (("ggn", -0.2, blue), ("hessian", 0.2, red)):
    total = sum(traces[which].values())
    right.barh(
        place + shift,
        [100 * t / total for t in traces[which].values()],
        0.4,
        color=colour,
        label=f"trace, {which}",
    )
right.plot(
    [100 * size / problem.size for size in sizes.values()],
    place,
    "o",
    color="#d9a441",
    label="parameters",
)
right.set_yticks(place, parts)
right.set_ylim(len(parts) + 0.9, -0.6)
right.set_xlabel("share in percent")
right.set_title("Where the curvature is", loc="left", color=blue, fontsize=11)
for axes, where in (
    (left, "upper right"),
    (middle, "lower left"),
    (right, "lower right"),
):
    axes.legend(frameon=False, loc=where, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
