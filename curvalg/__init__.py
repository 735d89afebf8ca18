"""curvalg: an operator algebra for the curvature of neural networks.

>>> from curvalg import Identity, registry
>>> print(registry.build("ggn") + 1e-3 * Identity)
ggn + 0.001*identity
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvalg import differentiable as differentiable
    from curvalg import distributed as distributed
    from curvalg import errors as errors
    from curvalg import estimate as estimate
    from curvalg import losses as losses
    from curvalg import planning as planning
    from curvalg import registry as registry
    from curvalg.errors import CheckpointError as CheckpointError
    from curvalg.errors import ConvergenceError as ConvergenceError
    from curvalg.errors import CurvalgError as CurvalgError
    from curvalg.errors import CurvalgWarning as CurvalgWarning
    from curvalg.errors import ExpressionError as ExpressionError
    from curvalg.errors import FactsError as FactsError
    from curvalg.errors import GroupError as GroupError
    from curvalg.errors import LossError as LossError
    from curvalg.errors import LossTypeError as LossTypeError
    from curvalg.errors import NotFiniteError as NotFiniteError
    from curvalg.errors import OptionError as OptionError
    from curvalg.errors import ProblemError as ProblemError
    from curvalg.errors import ProblemTypeError as ProblemTypeError
    from curvalg.errors import RegistryError as RegistryError
    from curvalg.errors import StaleError as StaleError
    from curvalg.errors import TermOptionError as TermOptionError
    from curvalg.errors import VectorError as VectorError
    from curvalg.errors import VectorTypeError as VectorTypeError
    from curvalg.expr import Block as Block
    from curvalg.expr import DatasetTerm as DatasetTerm
    from curvalg.expr import Diagonal as Diagonal
    from curvalg.expr import DiagonalEstimate as DiagonalEstimate
    from curvalg.expr import DiagonalPart as DiagonalPart
    from curvalg.expr import Eigenbasis as Eigenbasis
    from curvalg.expr import Entries as Entries
    from curvalg.expr import Expr as Expr
    from curvalg.expr import Facts as Facts
    from curvalg.expr import GradientTerm as GradientTerm
    from curvalg.expr import Identity as Identity
    from curvalg.expr import Kronecker as Kronecker
    from curvalg.expr import LossFacts as LossFacts
    from curvalg.expr import LowRank as LowRank
    from curvalg.expr import MatrixTerm as MatrixTerm
    from curvalg.expr import Nystrom as Nystrom
    from curvalg.expr import SquareRoot as SquareRoot
    from curvalg.expr import Term as Term
    from curvalg.expr import Zero as Zero
    from curvalg.expr import block_diagonal as block_diagonal
    from curvalg.expr import diagonal_part as diagonal_part
    from curvalg.expr import inv_sqrt as inv_sqrt
    from curvalg.expr import inverse as inverse
    from curvalg.expr import nystrom as nystrom
    from curvalg.expr import restrict as restrict
    from curvalg.expr import sqrt as sqrt
    from curvalg.files import load as load
    from curvalg.files import save as save
    from curvalg.lowering import CurvatureOperator as CurvatureOperator
    from curvalg.lowering.matrices import Eigh as Eigh
    from curvalg.lowering.plans.block_view import MatrixBlock as MatrixBlock
    from curvalg.problem import Batch as Batch
    from curvalg.problem import FactorPairs as FactorPairs
    from curvalg.problem import GradientField as GradientField
    from curvalg.problem import LayerRecord as LayerRecord
    from curvalg.problem import Layout as Layout
    from curvalg.problem import Problem as Problem
    from curvalg.registry.parse import parse as parse

_ERRORS = (
    "CurvalgError",
    "CurvalgWarning",
    "ExpressionError",
    "OptionError",
    "RegistryError",
    "TermOptionError",
    "ProblemError",
    "LossError",
    "FactsError",
    "VectorError",
    "LossTypeError",
    "NotFiniteError",
    "ProblemTypeError",
    "VectorTypeError",
    "ConvergenceError",
    "StaleError",
    "GroupError",
    "CheckpointError",
)
_EXPR = (
    "Block",
    "DatasetTerm",
    "Diagonal",
    "DiagonalEstimate",
    "DiagonalPart",
    "Eigenbasis",
    "Entries",
    "Expr",
    "Facts",
    "GradientTerm",
    "Identity",
    "Kronecker",
    "LossFacts",
    "LowRank",
    "MatrixTerm",
    "Nystrom",
    "SquareRoot",
    "Term",
    "Zero",
    "block_diagonal",
    "diagonal_part",
    "inv_sqrt",
    "inverse",
    "nystrom",
    "restrict",
    "sqrt",
)
# Where each public name lives. Names are resolved on first use, so that importing curvalg costs nothing and building
# expressions never imports torch.
_HOME: dict[str, str] = {
    **dict.fromkeys(_ERRORS, "curvalg.errors"),
    **dict.fromkeys(_EXPR, "curvalg.expr"),
    "parse": "curvalg.registry.parse",
    "load": "curvalg.files",
    "save": "curvalg.files",
    "CurvatureOperator": "curvalg.lowering",
    "Eigh": "curvalg.lowering.matrices",
    "MatrixBlock": "curvalg.lowering.plans.block_view",
    "Batch": "curvalg.problem",
    "FactorPairs": "curvalg.problem",
    "GradientField": "curvalg.problem",
    "LayerRecord": "curvalg.problem",
    "Layout": "curvalg.problem",
    "Problem": "curvalg.problem",
}
_MODULES: dict[str, str] = {
    "differentiable": "curvalg.differentiable",
    "distributed": "curvalg.distributed",
    "errors": "curvalg.errors",
    "estimate": "curvalg.estimate",
    "registry": "curvalg.registry",
    "losses": "curvalg.losses",
    "planning": "curvalg.planning",
}

__all__ = sorted([*_HOME, *_MODULES])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'curvalg' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", "__doc__", "__name__"})
