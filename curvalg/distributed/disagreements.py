"""What is said where ranks do not agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DIFFERENT_VECTORS = (
    "the ranks multiply different vectors; make them on one rank and broadcast them, or from a generator that is seeded alike "
    "on all ranks (SciPy's solvers draw a start vector of their own: pass v0=, or use curvalg.estimate.eigsh)"
)


def different_places(where: Sequence[str]) -> str:
    """The message where ranks are at different places of the program."""
    shown = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(where))
    return (
        f"the ranks are at different places of the program ({shown}); every rank has to make the same calls in the same order, "
        "with the same expressions and options"
    )


def different_states(every: Sequence[Mapping[str, int]]) -> str:
    """The message where ranks hold different states.

    Args:
        every: hashes of what belongs to the state, by name, of each rank.
    """
    every_name = dict.fromkeys(name for one in every for name in one)
    names = [name for name in every_name if len({one.get(name) for one in every}) > 1]
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    values = [one.get(names[0] if names else "") for one in every]
    common = max(set(values), key=values.count)
    odd = next((rank for rank, value in enumerate(values) if value != common), 0)
    return (
        f"the ranks hold different models, losses or options: {shown or 'another problem'} (rank {odd} differs from the "
        "others). Load the same state on all ranks (torch.distributed.broadcast of each tensor, or one checkpoint), and "
        "set the same flags and options"
    )


def gone(what: object, rank: int, size: int, said: str) -> str:
    """The message where an exchange failed.

    Args:
        what: the exchange was of.
        rank: of this process.
        size: the number of processes.
        said: what torch says.
    """
    return (
        f"an exchange of {what} failed on rank {rank} of {size}: a process ended, or did not answer within the timeout of its "
        f"process group ({said}). The group cannot be used any more: start the job again (torchrun --max-restarts does); "
        "checkpoint= resumes where it was"
    )
