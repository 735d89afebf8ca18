"""The exchanges of several processes.

Each begins with a frame of fixed size from each rank: a header of 40 bytes (what comes next, its running number, its
length, hashes of the operand and of the state) and room for a payload of a few numbers. So a rank that failed, took another
way or was given another vector is an error on all ranks, not a hang and not a wrong number; and nothing has begun by then
that would have to be undone.
"""

from __future__ import annotations

import hashlib
import io
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.distributed.dealing import owners
from curvalg.distributed.disagreements import DIFFERENT_VECTORS, different_places, different_states, gone
from curvalg.distributed.group import Group, activated
from curvalg.distributed.meeting import Meeting
from curvalg.distributed.packing import TensorForm, filled, joined_numbers, measures, packed, riding
from curvalg.errors import GroupError, ProblemTypeError
from curvalg.tensors import trees
from curvalg.tensors.bits import fingerprint

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C on some rank, raised on all ranks at one exchange."""


SUM, ROWS, NUMBERS, OBJECT, FAILURE, GATHER, SCATTER, LARGEST, SWAP = range(1, 10)
FAILED, STOPPED = 1 << 8, 1 << 9
HEADER, ROOM = 5, 27
"""Integers of 8 bytes in a header, and numbers that ride in a frame."""


class Line:
    """How far the exchanges of a process group have come, of all problems that these processes share.

    Attributes:
        number: of exchanges that were begun.
        broken: why there can be no more, or None.
        stopped: whether Ctrl-C is to be told with the next one, whichever of the exchanges of these processes that is.
    """

    def __init__(self) -> None:
        self.number = 0
        self.broken: str | None = None
        self.stopped = False


_LINES: WeakKeyDictionary[Any, Line] = WeakKeyDictionary()
"""By process group: it is one line, however many problems use it."""


class Processes(Group):
    """Ranks of a process group of torch.distributed.

    Args:
        group: the process group.
        device: where the parameters are.
        lock: held while all do something together: by one thread at a time.
        told: the process group of all that compute together, where these are more: errors and places in the program are
            theirs, payloads those of ``group``.
    """

    alone = False

    def __init__(self, group: Any, device: torch.device, lock: AbstractContextManager[Any], told: Any = None) -> None:
        import torch.distributed as dist

        super().__init__()
        self._dist, self._group = dist, group
        self._told = group if told is None else told
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._place_told, self._number_told = dist.get_rank(self._told), dist.get_world_size(self._told)
        self._members = [dist.get_group_rank(self._told, rank) for rank in dist.get_process_group_ranks(group)]
        backend = str(
            dist.get_backend_config(group) if hasattr(dist, "get_backend_config") else dist.get_backend(group)
        )
        self._place = device
        self._host = torch.device("cpu") if "gloo" in backend or "mpi" in backend else device
        self._device_capable = device.type == "cpu" or "nccl" in backend or "ucc" in backend
        self._line = _LINES.setdefault(self._told, Line())
        self._meeting: Meeting | None = Meeting(self._told)
        self._operand = 0
        self._state: object = None
        self._digests: Callable[[], Mapping[str, int]] = dict
        self._state_hash: int | None = 0
        self._depth = 0
        self._what: object = "nothing"
        self._lock = lock

    def __reduce__(self) -> NoReturn:
        raise ProblemTypeError(
            "a problem of several processes cannot be pickled: its process group is of live processes. Save what was computed "
            "(curvalg.save), and make the Problem anew"
        )

    # -- what all do together -------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, what: object) -> Iterator[None]:
        with self._lock:
            if self._depth:
                yield
                return
            self._depth, self._what, self._operand = 1, what, 0
            try:
                with self.telling(), self._interruptible(), activated(self):
                    yield
            finally:
                self._depth = 0

    @contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not _is_known(error):
                self._tell(error)
                setattr(error, _KNOWN, True)
            raise

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C is noted and told at the next exchange, so that all ranks stop at the same one; a second one stops at once."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self._line.stopped:
                signal.default_int_handler(number, frame)
            self._line.stopped = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
            if self._line.stopped:  # there was no exchange any more: the others have what they wanted
                raise Interrupted
        finally:
            self._line.stopped = False
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _tell(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on; they raise. Where all failed alike each raises its own."""
        if self._line.broken is None:
            try:
                self._frame(FAILURE, 0, failure=f"{type(error).__name__}: {error}")
            except Interrupted:
                pass  # its own error says more
            except GroupError as gone:
                error.add_note(str(gone))

    def at(self, state: object, digests: Callable[[], Mapping[str, int]]) -> None:
        if state is not self._state:
            self._state, self._digests, self._state_hash = state, digests, None

    def multiplying(self, operand: Tensor) -> None:
        self._operand = int(fingerprint(operand)) | 1

    # -- the frame ------------------------------------------------------------------------------------------------------

    def _frame(
        self, kind: int, length: int, payload: Tensor | None = None, failure: str | None = None
    ) -> list[list[int]]:
        """The frames of the ranks of the group, once all have sent one; raises on all together where they do not fit."""
        if self._line.broken is not None:
            raise GroupError(self._line.broken)
        self._line.number += 1
        self.headers += 1
        frame = torch.zeros(HEADER + ROOM, dtype=torch.int64, device="cpu")
        flags = (FAILED if failure is not None else 0) | (STOPPED if self._line.stopped else 0)
        if self._state_hash is None:
            text = repr(sorted(self._digests().items()))
            self._state_hash = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        frame[:HEADER] = torch.tensor(
            [kind | flags, self._line.number, length, self._operand, self._state_hash], device="cpu"
        )
        if payload is not None:
            frame[HEADER : HEADER + len(payload)] = payload.to("cpu", torch.float64).view(torch.int64)
        frame = frame.to(self._host)
        every = [torch.empty_like(frame) for _ in range(self._number_told)]
        self._call(lambda: self._send(frame, every))
        frames = [[int(n) for n in one] for one in torch.stack(every).tolist()]
        self._operand = 0
        self._require_fitting(frames, failure)
        return [frames[place] for place in self._members]

    def _send(self, frame: Tensor, every: list[Tensor]) -> None:
        """Send the frame of this rank, and take those of all."""
        if self._meeting is None:
            self._dist.all_gather(every, frame, group=self._told)
            return
        work = self._dist.all_gather(every, frame, group=self._told, async_op=True)
        self._meeting.wait(work)
        self._meeting = None  # they mean the same group from now on
        work.wait()

    def _require_fitting(self, frames: Sequence[Sequence[int]], failure: str | None) -> None:
        first = [frame[0] for frame in frames]
        if any(word & FAILED for word in first):
            said = self._said(failure)
            self._line.number = max(frame[1] for frame in frames)
            if failure is not None:  # raises its own error
                return
            rank = next(r for r, text in enumerate(said) if text is not None)
            more = sum(text is not None for text in said) - 1
            others = f" (and {more} more)" if more else ""
            raise GroupError(f"rank {rank} of {self._number_told}{others} failed: {said[rank]}")
        if any(word & STOPPED for word in first):
            self._line.number = max(frame[1] for frame in frames)
            self._line.stopped = False
            raise Interrupted
        if len({(frame[0], frame[1]) for frame in frames}) > 1:
            where = self._said(f"{_NAMES[first[self._place_told]]} in {self._what}")
            self._line.number = max(frame[1] for frame in frames)
            raise GroupError(different_places(where))
        if len({frame[4] for frame in frames}) > 1:
            raise GroupError(different_states(self._said(dict(self._digests()))))
        if len({frame[3] for frame in frames}) > 1:
            raise GroupError(DIFFERENT_VECTORS)

    def _said(self, own: Any) -> list[Any]:
        """What all that compute together say."""
        every: list[Any] = [None] * self._number_told
        self._call(lambda: self._dist.all_gather_object(every, own, group=self._told))
        return every

    def _gathered(self, own: Any) -> list[Any]:
        every: list[Any] = [None] * self.size
        self._call(lambda: self._dist.all_gather_object(every, own, group=self._group))
        return every

    def _call(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except GroupError as error:
            self._line.broken = str(error)
            raise
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0][:200]
            self._line.broken = gone(self._what, self._place_told, self._number_told, said)
            raise GroupError(self._line.broken) from error

    # -- exchanges ------------------------------------------------------------------------------------------------------

    def sum(self, value: T) -> T:
        flat = [] if value is None else trees.tensors(value)
        length = -1 if value is None else sum(t.numel() for t in flat)
        rides = 0 < length <= ROOM and not any(t.is_complex() for t in flat)
        joined = joined_numbers(flat)  # what there is no memory for fails before the exchange begins
        frames = self._frame(SUM, length, joined if rides else None)
        lengths = [frame[2] for frame in frames]
        if max(lengths) < 0:
            return value
        if min(lengths) < 0:  # a rank has no data: it learns the form from another
            form = self._form(lengths, None if value is None else trees.tensor_map(TensorForm, value))
            if value is None:
                value = trees.leaf_map(
                    lambda leaf: leaf.zeros(self._place) if isinstance(leaf, TensorForm) else leaf, form
                )
                flat = trees.tensors(value)
        else:
            self._require_alike(lengths)
        if joined is None:
            joined = joined_numbers(flat)
        if joined is None:
            return value
        if max(lengths) <= ROOM:
            given = [riding(f[HEADER:], max(lengths)) for f in frames if f[2] >= 0]
            return filled(value, torch.stack(given).sum(0))
        return filled(value, self._reduced(joined))

    def sums(self, parts: Iterable[Tensor]) -> list[Tensor]:
        under_way: list[tuple[Any, Tensor, Tensor]] = []
        try:
            for part in parts:
                own = part.contiguous() if self._device_capable else part.cpu().contiguous()
                self._require_alike([frame[2] for frame in self._frame(SUM, own.numel())])
                under_way.append((self._begun(own), own, part))
        finally:  # those that began have begun on all ranks
            for work, _, _ in under_way:
                self._call(work.wait)
        return [own.to(part.device) for _, own, part in under_way]

    def _begun(self, own: Tensor) -> Any:
        """A sum over ranks that goes on by itself."""
        found: list[Any] = []
        self._call(lambda: found.append(self._dist.all_reduce(own, group=self._group, async_op=True)))
        self._paid(own)
        return found[0]

    @staticmethod
    def _require_alike(lengths: Sequence[int]) -> None:
        if len(set(lengths)) > 1:
            raise GroupError(
                f"the ranks have sums of different sizes ({lengths} numbers): their models, or the options of a term, differ"
            )

    def _form(self, lengths: Sequence[int], own: Any) -> Any:
        """The form of what ranks with data have."""
        return next(form for n, form in zip(lengths, self._gathered(own), strict=True) if n >= 0)

    def _reduced(self, buffer: Tensor) -> Tensor:
        own = buffer if self._device_capable else buffer.cpu()
        self._call(lambda: self._dist.all_reduce(own, group=self._group))
        self._paid(own)
        return own.to(buffer.device)

    def _paid(self, buffer: Tensor) -> None:
        self.payloads += 1
        self.bytes += buffer.numel() * buffer.itemsize

    def largest(self, own: Tensor) -> Tensor:
        rides = own.numel() <= ROOM
        frames = self._frame(LARGEST, own.numel(), own.detach().reshape(-1).to("cpu", torch.float64) if rides else None)
        self._require_alike([frame[2] for frame in frames])
        if rides:
            found = torch.stack([riding(frame[HEADER:], own.numel()) for frame in frames]).amax(0)
            return found.reshape(own.shape).to(own.device, own.dtype)
        sent = (own if self._device_capable else own.cpu()).contiguous()
        every = [torch.empty_like(sent) for _ in range(self.size)]
        self._call(lambda: self._dist.all_gather(every, sent, group=self._group))
        self._paid(sent)
        return torch.stack(every).amax(0).to(own.device)

    def rows(self, local: Tensor | None, dim: int = 0) -> Tensor:
        found: Tensor | None = local if local is None else local.detach().movedim(dim, 0).contiguous()
        form = None if found is None else torch.tensor([*found.shape[1:], found.element_size()][-ROOM:], device="cpu")
        frames = self._frame(ROWS, -1 if found is None else len(found), form)
        lengths = [frame[2] for frame in frames]
        if max(lengths) < 0:
            raise GroupError("no process has any row")
        if len({tuple(frame[HEADER:]) for frame in frames if frame[2] >= 0}) > 1:
            raise GroupError("the ranks have rows of different forms: their models, options or data differ")
        if min(lengths) < 0:
            like = self._form(lengths, None if found is None else TensorForm(found[:0]))
            found = like.zeros(self._place) if found is None else found
        assert found is not None
        most = max(0, *lengths)
        padded = found.new_zeros(most, *found.shape[1:])
        padded[: len(found)] = found
        own = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
        own = own if self._device_capable else own.cpu()
        every = [torch.empty_like(own) for _ in lengths]
        self._call(lambda: self._dist.all_gather(every, own, group=self._group))
        self._paid(own)
        whole = torch.cat([part[: max(n, 0)] for part, n in zip(every, lengths, strict=True)])
        return whole.to(found.device, found.dtype).movedim(0, dim)

    def numbers(self, *own: float) -> list[list[float]]:
        frames = self._frame(NUMBERS, len(own), torch.tensor(own, dtype=torch.float64, device="cpu"))
        return [riding(frame[HEADER:], len(own)).tolist() for frame in frames]

    def clock(self) -> float:
        return self.numbers(time.perf_counter())[0][0]

    def every(self, own: bool) -> bool:
        return all(bool(flag) for (flag,) in self.numbers(float(own)))

    def least(self, own: float) -> float:
        return min(number for (number,) in self.numbers(float(own)))

    def objects(self, own: T) -> list[T]:
        self._frame(OBJECT, 0)
        self.payloads += 1
        return self._gathered(own)

    def first(self, own: T) -> T:
        return self.of(0, own)  # type: ignore[no-any-return]

    def of(self, rank: int, own: Any) -> Any:
        made = packed(own) if self.rank == rank else b""  # what cannot be sent fails before the exchange begins
        frames = self._frame(OBJECT, len(made))
        return self._sent(rank, made, frames[rank][2])

    def _sent(self, rank: int, packed: bytes, length: int) -> Any:
        """What one rank has packed, unpacked on this process's device."""
        buffer = (
            torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            if packed
            else torch.empty(length, dtype=torch.uint8, device="cpu")
        )
        buffer = buffer.to(self._host)
        source = self._dist.get_global_rank(self._group, rank)
        self._call(lambda: self._dist.broadcast(buffer, src=source, group=self._group))
        self._paid(buffer)
        return torch.load(io.BytesIO(buffer.cpu().numpy().tobytes()), map_location=self._place, weights_only=False)

    def dealt(self, tasks: Sequence[Callable[[], T]], costs: Sequence[float]) -> list[T]:
        chosen = owners(costs, self.size)
        own = {i: task() for i, task in enumerate(tasks) if chosen[i] == self.rank}
        found = {i: result for rank in range(self.size) if rank in chosen for i, result in self.of(rank, own).items()}
        return [found[i] for i in range(len(tasks))]

    def agree(self, own: Mapping[str, Any], advice: str) -> None:
        every = self.objects({name: repr(value) for name, value in own.items()})
        for name in dict.fromkeys(n for one in every for n in one):
            values = [one.get(name) for one in every]
            if len(set(values)) > 1:
                shown = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values[:4]))
                raise GroupError(f"the ranks differ in {name}: {shown}; {advice}")

    def alike(self, what: str, *own: Tensor | None) -> None:
        (count, total, size, rounding), *others = self.numbers(*measures(own))
        if any(n != count or abs(other - total) > rounding * max(size, most) for n, other, most, _ in others):
            raise GroupError(
                f"the ranks have different {what}; give all ranks the same, in the same order, or each rank its part of them "
                "in a Problem of its own with group="
            )


_NAMES = {SUM: "a sum", ROWS: "rows", NUMBERS: "numbers", OBJECT: "an object", FAILURE: "an error"}
_NAMES |= {
    GATHER: "weights of a layer",
    SCATTER: "gradients of a layer",
    LARGEST: "a maximum",
    SWAP: "numbers of layers",
}
_NAMES |= {kind | STOPPED: name for kind, name in _NAMES.items()}


_KNOWN = "_known_on_all_ranks"
"""An attribute of errors that the other ranks were told of."""


def _is_known(error: BaseException | None) -> bool:
    """Whether all ranks know of an error, or of one that it was made of: a further exchange would have no partners."""
    while error is not None:
        if isinstance(error, (GroupError, Interrupted)) or getattr(error, _KNOWN, False):
            return True
        error = error.__cause__ or error.__context__
    return False
