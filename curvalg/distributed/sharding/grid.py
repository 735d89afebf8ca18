"""Processes in a grid: along one side the data are dealt out, along the other the matrices of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvalg.errors import ProblemTypeError


@dataclass(frozen=True)
class ProcessGrid:
    """The process groups that this process is in.

    Args:
        whole: of all processes.
        data: of those that have other data, and other parts of the parameters.
        tensor: the mesh of those that have the same data, and other columns or rows of each layer; None: there are none.
        ranks: global numbers of the processes along each side.
    """

    whole: Any
    data: Any
    tensor: Any
    ranks: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def rank(self) -> int:
        """The place of this process among those with other data."""
        import torch.distributed as dist

        return dist.get_rank(self.data)

    @property
    def size(self) -> int:
        """The number of processes with other data."""
        return len(self.ranks[0])

    @property
    def copies(self) -> int:
        """The number of processes with the same data."""
        return len(self.ranks[1])


def make_grid(group: Any, *, parallel: bool) -> ProcessGrid:
    """The processes of a group or mesh, for a model that lies in parts on them.

    Args:
        group: a ProcessGroup, or a DeviceMesh of one or two dimensions: first the data, then tensor parallelism.
        parallel: whether a mesh of one dimension is of tensor parallelism, rather than of the data.

    Raises:
        ProblemTypeError: something else.
    """
    import torch.distributed as dist

    if not hasattr(group, "get_group") or not hasattr(group, "mesh"):
        if parallel:
            raise ProblemTypeError(
                "the model is parallelised along a DeviceMesh; pass that mesh as group=, so that it is known which processes "
                "have the same data"
            )
        return ProcessGrid(group, group, None, (tuple(dist.get_process_group_ranks(group)), (dist.get_rank(),)))
    if group.ndim > 2:
        raise ProblemTypeError(
            f"group= is a mesh of one or two dimensions (data, and tensor parallelism), got one of {group.ndim}; pass a part "
            "of it, mesh['data', 'tensor']"
        )
    sides = [tuple(dist.get_process_group_ranks(group.get_group(side))) for side in range(group.ndim)]
    if group.ndim == 2:
        tensor = group[group.mesh_dim_names[1]] if group.mesh_dim_names else None
        if tensor is None:
            raise ProblemTypeError(
                "the dimensions of the mesh have no names; make it by init_device_mesh(..., "
                "mesh_dim_names=('data', 'tensor'))"
            )
        return ProcessGrid(_joined(group.mesh.flatten().tolist()), group.get_group(0), tensor, (sides[0], sides[1]))
    own = (dist.get_rank(),)
    if parallel:
        alone = dist.new_group(list(own), use_local_synchronization=True)
        return ProcessGrid(group.get_group(), alone, group, (own, sides[0]))
    return ProcessGrid(group.get_group(), group.get_group(), None, (sides[0], own))


def _joined(ranks: list[int]) -> Any:
    """The process group of some processes, made by these alone."""
    import torch.distributed as dist

    if sorted(ranks) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(sorted(ranks), use_local_synchronization=True)
