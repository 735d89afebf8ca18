"""A GPU simulated on the CPU, to find device bugs where there is none. Linux, a CPU build of torch, a C++ compiler.

    python -m pytest -p tests.support.simulated_gpu tests/device   # imported before torch: it registers a device "cuda:0"

    model = torch.nn.Linear(3, 2).cuda()     # modules, losses, optimisers, torch.func, vmap, autocast, double backward
    with simulated_gpu.watch("curvalg") as seen:
        model(torch.randn(5, 3, device="cuda")).sum().item()
    print(seen)                              # {("sync", "_local_scalar_dense", "folder/file.py:function:line"): 1}

A device tensor wraps a CPU tensor: device type, dispatch keys and autograd's worker thread are CUDA's, arithmetic the CPU's.
Graphs are captured (``torch.cuda.graph``: what the host would wait for raises) and replayed into the same memory.
As on a GPU these raise: operands on two devices (0-dimensional CPU tensors excepted in element-wise operations), CPU generators
for device tensors, ``numpy()``, ``np.asarray``, products of integer matrices. Random numbers come from a generator of the device.
``watch`` counts, by the innermost line of the given packages: "sync" (the host waits: item(), bool(), cpu(), nonzero(), masks as
indices, equal(), eigh), "upload" (blocking), "upload, async", "download, async" (values are NaN or 0 until something waits for
the device), "synchronize", "nondeterministic" (CUDA kernels that add in any order), "float64" (made on the device).
``options``: ``float64`` (False: refused, as on Apple's MPS), ``free`` and ``total`` bytes, ``operations`` that ran, by name.

Limits: one device, one stream that runs (others are names), kernels and uploads are never late, no limit of memory, cuDNN, LSTM, GRU, fused attention, compiled
code, ``inference_mode`` or pinning threads. A pass says that devices are not mixed, not that a GPU gives the same numbers.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

_SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, {c10::DeviceType::CUDA, 0}); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def _unavailable(reason, code=1):
    """End the run with a message: a traceback through the plugins of pytest would hide it."""
    print(f"there is no simulated GPU: {reason}", file=sys.stderr)
    raise SystemExit(code)


def _register():
    """Compile what tells torch's core of a CUDA device (seconds, once), and load it before torch asks."""
    home = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    if (home / "lib" / "libtorch_cuda.so").exists():
        # Where the suite runs on a real GPU, it has run these tests already.
        _unavailable("this build of torch is for real ones, on which the tests run without the plugin", 0)
    if "torch" in sys.modules:
        raise ImportError(
            "torch was imported before the simulated device: run python -m pytest -p tests.support.simulated_gpu tests/device"
        )
    key = zlib.crc32(f"{_SOURCE} {importlib.metadata.version('torch')} {home}".encode())
    library = Path(tempfile.gettempdir()) / f"simulated_gpu_{os.getuid()}_{key}.so"
    if not library.exists():
        fresh, lib = library.with_suffix(f".{os.getpid()}"), home / "lib"
        linked = [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
        if shutil.which(compiler := os.environ.get("CXX", "c++")) is None:
            _unavailable(f"there is no C++ compiler {compiler!r}: install one (g++, clang++), or name it in CXX")
        source = ["-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", "-x", "c++", "-"]
        made = subprocess.run([compiler, *source, "-o", fresh, *linked], input=_SOURCE.encode(), capture_output=True)
        if made.returncode:
            shown = made.stderr.decode(errors="replace").strip().splitlines()[:3]
            _unavailable(f"{compiler} does not compile against this build of torch: {' '.join(shown)}")
        fresh.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_register()
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch.utils._mode_utils import no_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
options = SimpleNamespace(float64=True, free=60 << 30, total=80 << 30, operations=Counter())
_watching, _underway = [], []
_capturing: list[list[tuple]] = []
"""The operations of the graph that is being captured, if any."""


class _EitherGenerator(type(torch.Generator)):
    def __instancecheck__(cls, value):
        return isinstance(value, _Generator)


_Generator = torch.Generator


class Generator(_Generator, metaclass=_EitherGenerator):
    """A generator of the host or of the simulated device, in place of torch's."""

    of_device: set[int] = set()

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, device="cpu")
        made.place = torch.device(device)
        if made.place.type == "cuda":
            made.place = CUDA
            cls.of_device.add(made._cdata)
        return made

    device = property(lambda self: self.place)

    def __del__(self):
        self.of_device.discard(self._cdata)


torch.Generator = Generator
_generator = Generator("cuda")


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated device; ``held`` are its values, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=CUDA, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # where the mode below is not, as in threads
        return _run(func, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {CUDA} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy
    __repr__ = lambda self, **kwargs: f"{self.held!r} on {CUDA}"
    tolist = property(lambda self: self.cpu().tolist)
    data_ptr = property(lambda self: self.held.data_ptr)
    untyped_storage = property(lambda self: self.held.untyped_storage)

    def __reduce_ex__(self, protocol):
        return torch.Tensor.to, (self.held.clone(), "cuda")

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        copy.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "held"}
        return memo.setdefault(id(self), copy)


class _Everything(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def watch(*packages):
    """Count what the module's docstring lists: a Counter by kind, operation and innermost line of these packages."""
    _watching.append((packages, Counter()))
    try:
        yield _watching[-1][1]
    finally:
        _watching.pop()


def _note(kind, name):
    if _capturing and kind in ("sync", "synchronize", "upload"):
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
    while kind in ("sync", "synchronize") and _underway:  # now the host has what was on its way
        there, values = _underway.pop()
        there.copy_(values)
    for packages, seen in _watching:
        frame, place = sys._getframe(2), "elsewhere"
        while frame is not None and place == "elsewhere":
            file = Path(frame.f_code.co_filename)
            if any(p in file.parts or p == file.stem for p in packages):
                place = f"{file.parent.name}/{file.name}:{frame.f_code.co_name}:{frame.f_lineno}"
            frame = frame.f_back
        seen[kind, name, place] += 1


_SYNC = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("bincount", "histc", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd"),
}
_ANY_ORDER = {
    *("scatter_add", "scatter_add_", "index_add", "index_add_", "index_reduce_", "scatter_reduce", "scatter_reduce_"),
    *("put_", "bincount", "histc", "embedding_dense_backward", "cumsum", "_adaptive_avg_pool2d_backward"),
    "upsample_bilinear2d_backward",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES, _PRODUCTS = {"_to_copy", "copy", "copy_"}, {"mm", "bmm", "addmm", "baddbmm", "dot", "mv", "addmv", "addbmm"}


def _run(func, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    ours, name = [x for x in leaves if isinstance(x, DeviceTensor)], func._opname
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else "cuda" if ours else "cpu"
    if name == "_efficientzerotensor":  # has no memory, which kernels below a mode look for
        func = torch.ops.aten.zeros.default
    if not ours and target != "cuda":
        return args[0] if name == "_pin_memory" else False if name == "is_pinned" else func(*args, **kwargs)
    if ours:
        _check(func, name, leaves, ours[0], args)
    options.operations[name] += 1
    mask = name in _INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name in _SYNC or mask or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _note("sync", name)
    if name in _ANY_ORDER or (name in _INDEXING and True in args[3:4]):
        _note("nondeterministic", name)
    copied = _note_copy(name, args, kwargs, target) if name in _COPIES else None
    held = [x.held if isinstance(x, DeviceTensor) else CPU if isinstance(x, torch.device) else x for x in leaves]
    plain, named = tree_unflatten(held, spec)
    with _random_numbers(func, named.get("generator")):
        result = func(*plain, **named)
    result = 0 if name == "_fused_sdp_choice" else result  # attention by the mathematical kernel
    if (
        _capturing
        and target == "cuda"
        and not any(isinstance(x, FakeTensor) for x in [*held, *tree_flatten(result)[0]])
    ):
        _capturing[-1].append((func, plain, named, result))
    if copied == "download, async":
        _underway.append((result, result.clone()))
        result.fill_(torch.nan if result.is_floating_point() else 0)
    for x in ours:
        if x.held.shape != x.shape or (torch.Tag.inplace_view in func.tags and x.held.stride() != x.stride()):
            with no_dispatch():  # the wrapper follows what was changed in place
                torch.ops.aten.as_strided_(x, x.held.shape, x.held.stride(), x.held.storage_offset())
    known = {id(x.held): x for x in ours} | {id(x): x for x in leaves if isinstance(x, torch.Tensor)}

    def wrap(x):
        if not isinstance(x, torch.Tensor) or id(x) in known or target != "cuda":
            return known.get(id(x), x)
        if x.dtype == torch.float64:
            _note("float64", name)
            if not options.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
                )
        return DeviceTensor(x)

    return tree_map(wrap, result)


def _check(func, name, leaves, first, args):  # raise where a GPU would
    others = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)]
    scalars = torch.Tag.pointwise in func.tags or name.startswith(("_foreach", "fill"))
    changed = func._schema.is_mutable and any(args[0] is x for x in others)
    indices = name in _INDEXING and isinstance(args[0], DeviceTensor)  # may lie on the host
    if name not in _COPIES and not indices and (changed or any(x.ndim or not scalars for x in others)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {CUDA} and {CPU}!")
    if name in _PRODUCTS and not (first.dtype.is_floating_point or first.dtype.is_complex):
        raise RuntimeError(f'"addmm_cuda" not implemented for {first.dtype}')


def _note_copy(name, args, kwargs, target):
    source, there = (args[0], target) if name == "_to_copy" else (args[1], args[0].device.type)
    late = ", async" if kwargs.get("non_blocking") or True in args[2:3] else ""
    kind = f"upload{late}" if there == "cuda" else f"download{late}" if late else "sync"
    if source.device.type == there:
        return None
    _note(kind, name)
    return kind


@contextmanager
def _random_numbers(func, given):
    if given is not None and given._cdata not in Generator.of_device:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if torch.Tag.nondeterministic_seeded not in func.tags or given is not None:
        yield
        return
    host, _ = (default := torch.default_generator).get_state(), default.set_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(default.get_state())
        default.set_state(host)


class Stream:
    """A stream by name: everything runs at once and in order."""

    def __init__(self, device=None, **kwargs):
        self.device = CUDA

    def wait_stream(self, other):
        """Wait for another stream, which has nothing left to do."""

    def synchronize(self):
        """Wait for the stream."""
        _note("synchronize", "Stream.synchronize")


class CUDAGraph:
    """Operations on the device as they were captured, run again on the same memory."""

    def __init__(self, **kwargs):
        self.operations: list[tuple] = []

    def replay(self):
        """Run all operations again; results go where they went."""
        options.operations["replay"] += 1
        for func, args, kwargs, results in self.operations:
            for new, old in zip(tree_flatten(func(*args, **kwargs))[0], tree_flatten(results)[0], strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    def reset(self):
        """Release what was captured."""
        self.operations = []


@contextmanager
def _graph(graph, pool=None, stream=None, capture_error_mode="global"):
    _capturing.append(graph.operations)
    try:
        yield
    finally:
        _capturing.pop()


@contextmanager
def _stream(stream):
    _streams.append(stream)
    try:
        yield
    finally:
        _streams.pop()


_streams = [Stream()]


def _install(cuda):
    lift = torch._C._set_only_lift_cpu_tensors  # a switch of each thread
    lift(True)  # for Tensor.new_tensor
    for name in ("tensor", "as_tensor", "asarray"):
        make = getattr(torch, name)
        setattr(torch, name, lambda *args, _make=make, **kwargs: (lift(True), _make(*args, **kwargs))[1])
    torch._C._set_cudnn_enabled(False)
    fixed = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_lazy_init": None,
        "get_device_name": "simulated",
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "set_device": None,
        "empty_cache": None,
        "memory_reserved": 0,
        "memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 0,
    }
    for name, value in fixed.items():
        setattr(cuda, name, lambda *args, _value=value, **kwargs: _value)
    cuda.CUDAGraph, cuda.graph, cuda.graph_pool_handle = CUDAGraph, _graph, object
    cuda.Stream, cuda.stream, cuda.current_stream = Stream, _stream, lambda device=None: _streams[-1]
    cuda.is_current_stream_capturing = lambda: bool(_capturing)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(has_fp64=options.float64)
    cuda.mem_get_info = lambda device=None: (options.free, options.total)
    cuda.synchronize = lambda device=None: _note("synchronize", "torch.cuda.synchronize")
    cuda.default_generators, cuda.manual_seed = (_generator,), _generator.manual_seed
    cuda.manual_seed_all = lambda seed: _generator.manual_seed(seed) and None
    cuda.get_rng_state = lambda device=None: _generator.get_state()
    cuda.set_rng_state = lambda state, device=None: _generator.set_state(state) and None
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps the Parameter objects, as on a GPU
    _Everything().__enter__()


_install(torch.cuda)
