"""Terms with one bug each, by the check that must find it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from curvalg import DatasetTerm, Diagonal, Facts, MatrixTerm, Term, registry


@dataclass(frozen=True)
class Squares(Term):
    """Σ Jᵀ J: what the bugs below are planted in."""

    def facts(self, loss=None):
        return Facts(psd=True)

    def cotangent_dot(self, batch, tangent):
        return tangent


# -- values -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForgottenOption(Squares):
    """An option that equality does not see."""

    scale: float = field(default=1.0, compare=False)

    def cotangent_dot(self, batch, tangent):
        return self.scale * tangent


@dataclass(frozen=True)
class Unhashable(Squares):
    """A list for an option."""

    parts: list[int] = field(default_factory=lambda: [1])


@dataclass(frozen=True)
class LosesOptions(Squares):
    """Pickles without its options."""

    k: int = 1

    def __reduce__(self):
        return type(self), ()


class Opaque:
    """Something whose repr is an address."""

    def __eq__(self, other):
        return isinstance(other, Opaque)

    def __hash__(self):
        return 0


@dataclass(frozen=True)
class Addressed(Squares):
    """Prints an address."""

    what: object = None


@dataclass(frozen=True)
class CountsUp(Squares):
    """Changes its option each time it is made."""

    k: int = 0

    def __post_init__(self):
        object.__setattr__(self, "k", self.k + 1)


@dataclass(frozen=True)
class Undescribed(Squares):
    __doc__ = None

    def cotangent_dot(self, batch, tangent):
        return tangent


@dataclass(frozen=True)
class AssumesLoss(Squares):
    """Looks at a loss that may not be there."""

    def validate(self, loss):
        if loss.name == "none of ours":
            raise AssertionError


# -- algebra ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongShape(Squares):
    """A rate that is not of the output's shape."""

    def cotangent_dot(self, batch, tangent):
        return tangent[:1]


@dataclass(frozen=True)
class Magnitude(Squares):
    """Not linear."""

    def cotangent_dot(self, batch, tangent):
        return tangent.abs()


@dataclass(frozen=True)
class Detached(Term):
    """Cannot be transposed by autograd, and nobody says so."""

    def cotangent_dot(self, batch, tangent):
        return tangent + tangent.detach().roll(1, -1)


@dataclass(frozen=True)
class Twice(Squares):
    """Twice the GGN, where the reference is the GGN."""

    def cotangent_dot(self, batch, tangent):
        return 2 * batch.loss_hvp(tangent)


@dataclass(frozen=True)
class ClaimsDefinite(Term):
    """The residual, said to be positive semi-definite."""

    def facts(self, loss=None):
        return Facts(psd=True)

    def cotangent(self, batch):
        return batch.loss_gradient


@dataclass(frozen=True)
class ClaimsSymmetric(Term):
    """Said to be symmetric."""

    def facts(self, loss=None):
        return Facts(symmetric=True)

    def cotangent_dot(self, batch, tangent):
        return tangent.roll(1, -1)


@dataclass(frozen=True)
class ForgetsLoss(Squares):
    """True of any loss, but not of this one."""

    def facts(self, loss=None):
        return Facts(psd=True) if loss is None else Facts()


# -- data ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchMean(Squares):
    """Averages over the batch."""

    def cotangent_dot(self, batch, tangent):
        return tangent / len(tangent)


@dataclass(frozen=True)
class WritesTangent(Squares):
    """Right by itself, but doubles the tangent of the other terms of its sum."""

    def cotangent_dot(self, batch, tangent):
        return tangent.mul_(2)


@dataclass(frozen=True)
class Draws(DatasetTerm):
    """Draws from the global generator, to no effect."""

    def facts(self, loss=None):
        return Facts(psd=True)

    def prepare(self, batch):
        return 0 * torch.rand(())

    def cotangent_dot(self, batch, tangent, prepared, totals):
        return tangent + prepared


@dataclass(frozen=True)
class Underflows(Squares):
    """Leaves the range of single precision on the way."""

    def cotangent_dot(self, batch, tangent):
        return tangent * 1e-30 * 1e-30 * 1e30 * 1e30


@dataclass(frozen=True)
class CastsDown(Squares):
    """Computes in single precision whatever comes."""

    def cotangent_dot(self, batch, tangent):
        return tangent.float()


# -- execution ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallsModel(Term):
    """Runs the model again for every batch."""

    def cotangent(self, batch):
        gradient = batch.loss_gradient
        return gradient + 0 * batch.vjp(gradient).sum()


@dataclass(frozen=True)
class Branches(Squares):
    """Looks at values, which vmap does not have."""

    def cotangent_dot(self, batch, tangent):
        return tangent if tangent.sum().item() > 0 else 1.0 * tangent


@dataclass(frozen=True)
class BranchesInReduce(DatasetTerm):
    """Looks at values where the data are reduced."""

    def reduce(self, batch, tangent, prepared):
        return tangent.sum() if float(tangent.sum()) else 0 * tangent.sum()

    def cotangent_dot(self, batch, tangent, prepared, totals):
        return batch.loss_gradient * totals


CALLS = [0]


@dataclass(frozen=True)
class Remembers(Term):
    """Counts how often it was asked."""

    def cotangent(self, batch):
        CALLS[0] += 1
        return CALLS[0] * batch.loss_gradient


# -- structure ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsForPositions(Term):
    """Adds up the positions of a row, and says that it acts on each by itself."""

    acts_on = "positions"

    def facts(self, loss=None):
        return Facts(psd=True)

    def cotangent_dot(self, batch, tangent):
        return batch.loss_gradient * batch.dot(batch.loss_gradient, tangent)


@dataclass(frozen=True)
class PullsBack(Term):
    """Needs the parameters, and says that it acts on positions."""

    acts_on = "positions"

    def cotangent(self, batch):
        return batch.loss_gradient * batch.vjp(batch.loss_gradient).square().sum()


@dataclass(frozen=True)
class PerParameter(DatasetTerm):
    """Divides by the number of parameters it sees."""

    def facts(self, loss=None):
        return Facts(psd=True)

    def prepare(self, batch):
        return batch.vjp(batch.loss_gradient)

    def cotangent_dot(self, batch, tangent, prepared, totals):
        return tangent / prepared.numel()


@dataclass(frozen=True)
class WrongFactor(Squares):
    """A factor without its square root."""

    def cotangent_dot(self, batch, tangent):
        return batch.scale * batch.loss_gradient * batch.dot(batch.loss_gradient, tangent)

    def factor(self, batch):
        return batch.per_sample_columns(batch.scale * batch.loss_gradient[None])


@dataclass(frozen=True)
class WrongCount(Squares):
    """Miscounts its columns."""

    def cotangent_dot(self, batch, tangent):
        return batch.scale * batch.loss_gradient * batch.dot(batch.loss_gradient, tangent)

    def factor(self, batch):
        return batch.gradient_columns()

    def factor_columns(self, batch):
        return 7


# -- statistics ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientSquares(MatrixTerm):
    """A diagonal: what the bugs below are planted in."""

    def accumulate(self, batch, prepared=None):
        return {name: g.square().sum(0) for name, g in batch.per_sample_gradients().items()}

    def finish(self, stats, layout, prepared=None):
        return Diagonal(layout.flatten(stats))


@dataclass(frozen=True)
class Averages(GradientSquares):
    """Averages over the batch."""

    def accumulate(self, batch, prepared=None):
        return {name: g.square().mean(0) for name, g in batch.per_sample_gradients().items()}


@dataclass(frozen=True)
class BatchShaped(GradientSquares):
    """Statistics with an axis over the batch."""

    def accumulate(self, batch, prepared=None):
        return batch.loss_gradient.flatten(1).sum(1)

    def finish(self, stats, layout, prepared=None):
        return Diagonal(torch.ones(layout.size))


@dataclass(frozen=True)
class FinishesAsTerm(GradientSquares):
    """Finishes as something that needs the data again."""

    def finish(self, stats, layout, prepared=None):
        return registry.build("ggn")


@dataclass(frozen=True)
class WritesStats(GradientSquares):
    """Writes into its statistics."""

    def finish(self, stats, layout, prepared=None):
        return Diagonal(layout.flatten({name: s.mul_(2) for name, s in stats.items()}))


@dataclass(frozen=True, eq=False)
class MadeAgain(GradientSquares):
    """Equal only to itself, so that nothing that is kept for it is found again."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Misspelt(Term):
    """Defines a method that nothing calls."""

    def cotangent_dots(self, batch, tangent):
        return tangent


@dataclass(frozen=True)
class Empty(Term):
    """Gives no cotangent at all."""

    def cotangent_dot(self, batch, tangent):
        return None


PLANTED = [
    ("substance", Empty(), "zeros on all.*names of the methods"),
    ("substance", Misspelt(), "does not define cotangent or cotangent_dot.*defines cotangent_dots"),
    ("value", ForgottenOption(2.0), "compare=False"),
    ("value", Unhashable(), "tuples, not lists"),
    ("value", MadeAgain(), "a copy that is equal"),
    ("pickling", LosesOptions(3), "planted|loses_options"),
    ("text", Addressed(Opaque()), "at 0x"),
    ("errors", AssumesLoss(), "a problem with no loss.*AttributeError.*validate"),
    ("products", WrongShape(), "output's shape"),
    ("linearity", Magnitude(), r"A \(2v - 3w\).*relative difference"),
    ("adjoint", Detached(), r"no \.detach\(\)"),
    ("adjoint", ClaimsSymmetric(), "symmetric=True only where"),
    ("facts", ClaimsDefinite(), "no negative eigenvalue.*psd=None"),
    ("facts", ClaimsSymmetric(), "a symmetric matrix, as the facts say"),
    ("facts", ForgetsLoss(), "as for any loss"),
    ("laws", ClaimsSymmetric(), r"\(t \+ I/4\)\.T"),
    ("batch_split", BatchMean(), "never divide by a batch's size"),
    ("batch_split", Averages(), "never divide by a batch's size"),
    ("mutation", WritesTangent(), "writes into a tensor that it was given"),
    ("mutation", Draws(), "random state of torch"),
    ("dtypes", Underflows(), "range of single precision"),
    ("dtypes", CastsDown(), "cotangent_dot in the output's dtype"),
    ("fusion", WritesTangent(), "writes into a tensor that it was given"),
    ("model_calls", CallsModel(), "2 model calls.*got 4"),
    ("columns", Branches(), r"under torch\.func\.vmap.*\.item\(\)"),
    ("columns", BranchesInReduce(), r"reduce to run under torch\.func\.vmap"),
    ("kept", Remembers(), "Keep no state"),
    ("chunks", RowsForPositions(), "position by position.*'samples' with batch.dot"),
    ("chunks", PullsBack(), "must not declare acts_on"),
    ("restriction", PerParameter(), "sees only the chosen parameters"),
    ("blocks", PerParameter(), "block_diagonal"),
    ("factor", WrongFactor(), "square root"),
    ("factor", WrongCount(), "got 7"),
    ("additivity", Averages(), "accumulate over batches to add up"),
    ("additivity", BatchShaped(), r"shape \(2,\) instead of \(5,\)"),
    ("finish", FinishesAsTerm(), "array leaves"),
    ("finish", WritesStats(), "must not write into the statistics"),
    ("finish", MadeAgain(), "__eq__ and __hash__"),
]
"""(check, term, what its message must say)."""

REGISTERED = [
    ("parsing", CountsUp, "changing it again must change nothing"),
    ("description", Undescribed, "docstring"),
]
"""(check, class to register, what its message must say)."""
