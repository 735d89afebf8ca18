"""The empirical neural tangent kernel, found through entry points; between two data sets by :func:`cross_kernel`."""

from typing import TYPE_CHECKING, Any

from curvalg_plugins.ntk.term import ntk

if TYPE_CHECKING:
    from curvalg_plugins.ntk.cross import cross_kernel as cross_kernel

__all__ = ["cross_kernel", "ntk"]


def __getattr__(name: str) -> Any:
    if name != "cross_kernel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from curvalg_plugins.ntk.cross import cross_kernel  # needs torch, which listing the terms must not import

    return cross_kernel
