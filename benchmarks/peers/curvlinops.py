"""curvlinops: nothing is kept between products; several columns by vmap."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from curvlinops import (
    CGInverseLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    xtrace,
)
from curvlinops.examples import IdentityLinearOperator
from curvlinops.papyan2020traces.spectrum import LanczosApproximateSpectrumCached
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.peers.base import Difference, Peer, Run, answers
from benchmarks.workload import Workload

PRODUCTS = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator, "covariance": EFLinearOperator}
KRONECKER = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}
FISHERS = {"exact": "type-2", "empirical": "empirical"}


LANGUAGE = ("GPT", "GPT 64", "GPT-2", "GPT 5M", "GPT-2 124M", "tiny LM", "tiny attention")
LANGUAGE += ("HF GPT-2", "HF Llama", "HF BERT", "HF T5", "HF GPT-2 124M", "tiny HF GPT-2")
"""Models of sequences."""
TOKENS = "counts every token of a sequence as a sample of its own, and scales by their number"


class Curvlinops(Peer):
    """By its linear operators, with the test for determinism off."""

    name = "curvlinops"
    distribution = "curvlinops-for-pytorch"
    differs = tuple(
        Difference(question, TOKENS, LANGUAGE) for question in ("covariance", "kfac inverse", "kfac inverse again")
    )

    def operator(self, kind: Any, workload: Workload, **options: Any) -> Any:
        """One of its operators on a workload."""
        return kind(
            workload.model, workload.loss, workload.parameters, workload.data, check_deterministic=False, **options
        )

    @answers(*PRODUCTS)
    def product(self, workload: Workload, question: str) -> Run:
        """Of a vector or a matrix."""
        op = self.operator(PRODUCTS[question], workload)
        return lambda: op @ workload.vectors

    @answers("kfac exact", "kfac empirical", "ekfac exact", "ekfac empirical")
    def kronecker(self, workload: Workload, question: str) -> Run:
        """Weights and biases together, as curvalg has them."""
        term, fisher = question.split()
        options = {"fisher_type": FISHERS[fisher], "separate_weight_and_bias": False}
        return lambda: self.operator(KRONECKER[term], workload, **options) @ workload.vectors

    def inverted(self, kfac: Any, workload: Workload) -> Any:
        """With the damping of the workload."""
        return KFACInverseLinearOperator(kfac, damping=workload.sizes.damping, use_exact_damping=True)

    def kfac_inverse_operator(self, workload: Workload) -> Any:
        """Of linear layers and convolutions."""
        options = {"check_deterministic": False, "fisher_type": "empirical", "separate_weight_and_bias": False}
        parameters = list(workload.affine.values())
        kfac = KFACLinearOperator(workload.model, workload.loss, parameters, workload.data, **options)
        return self.inverted(kfac, workload)

    @answers("kfac inverse")
    def kfac_inverse(self, workload: Workload, question: str) -> Run:
        """Built in the time."""
        return lambda: self.kfac_inverse_operator(workload) @ workload.affine_vectors

    @answers("kfac inverse again")
    def kfac_inverse_again(self, workload: Workload, question: str) -> Run:
        """Of one operator."""
        op = self.kfac_inverse_operator(workload)
        return lambda: op @ workload.affine_vectors

    @answers("solve cg", "solve cg kfac")
    def conjugate_gradients(self, workload: Workload, question: str) -> Run:
        """By the routine of linear_operator, which it wraps."""
        sizes = workload.sizes

        def run() -> Tensor:
            shapes = [tuple(p.shape) for p in workload.parameters]
            identity = IdentityLinearOperator(shapes, workload.vectors.device, workload.vectors.dtype)
            damped = self.operator(GGNLinearOperator, workload) + sizes.damping * identity
            options: dict[str, Any] = {"tolerance": sizes.rtol, "max_iter": 1000}
            if question == "solve cg kfac":
                kfac = self.operator(KFACLinearOperator, workload, fisher_type="type-2", separate_weight_and_bias=False)
                options["preconditioner"] = self.inverted(kfac, workload).__matmul__
            solution: Tensor = CGInverseLinearOperator(damped, **options) @ workload.vectors
            return solution

        return run

    @answers("eigenvalues")
    def eigenvalues(self, workload: Workload, question: str) -> Run:
        """By SciPy on its operator, in float32 as it is."""
        sizes = workload.sizes
        start = workload.vector.cpu().numpy()

        def run() -> Tensor:
            plain = self.operator(HessianLinearOperator, workload).to_scipy()
            op = LinearOperator(plain.shape, matvec=lambda x: plain @ x.astype(np.float32), dtype=np.float32)
            found = eigsh(op, sizes.eigenvalues, which="LA", tol=sizes.tol, v0=start, return_eigenvectors=False)
            return torch.from_numpy(np.sort(found)[::-1].copy())

        return run

    @answers("density")
    def density(self, workload: Workload, question: str) -> Run:
        """The bounds of the spectrum, which it computes first, are inside."""
        sizes = workload.sizes

        def run() -> Tensor:
            cached = LanczosApproximateSpectrumCached(self.operator(HessianLinearOperator, workload), sizes.steps)
            cached.approximate_spectrum(num_repeats=sizes.probes)
            runs = [(values.double(), vectors[0].double() ** 2) for values, vectors in cached._lanczos_iters]
            return torch.stack([(weights * values**2).sum() for values, weights in runs]).mean()

        return run

    @answers("trace ggn", "trace hessian")
    def trace(self, workload: Workload, question: str) -> Run:
        """By XTrace."""
        kind = PRODUCTS[question.split()[1]]
        return lambda: torch.as_tensor(float(xtrace(self.operator(kind, workload), workload.sizes.products)))
