"""A GPU that is none: tensors say "cuda:0" and refuse the others, the CPU computes.

Code that forgets to move a tensor works on a CPU and stops on a GPU; this finds such places on
machines without one. `install()` changes torch for the whole process, so the tests run it in
processes of their own. It knows what a tensor says about its device, what PyTorch allows to
meet (a CPU tensor of one number, indices), and the answers of `torch.cuda`; no speed, memory,
streams, graphs, autocast or kernels of a GPU.
"""

import types

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "Pretended GPU"
CUDA = torch.device("cuda:0")
# Operations whose other arguments may lie elsewhere: copies, and indexing by CPU tensors.
MEET = ("aten.copy_.", "aten._to_copy.", "aten.index.", "aten.index_put", "aten._index_put")
TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; its numbers lie in `inner`, on the CPU."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device("pretended:0"), requires_grad=requires_grad)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def __repr__(self):
        return f"{repr(self.inner)[:-1]}, device='cuda:0')"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name, there = str(operation), kwargs.get("device")
        if not name.startswith(MEET) and any(
                x.ndim and not isinstance(x, OnGPU) for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but "
                               "found at least two devices, cuda:0 and cpu")
        if name.startswith("aten.index") and not isinstance(args[0], OnGPU):
            raise RuntimeError("indices should be on the CPU, as the indexed tensor")
        if name.startswith("aten._fused_sdp_choice"):
            return 0  # attention written out: the kernels are chosen by device
        if there is not None:
            kwargs["device"] = "cpu"
        result = operation(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name.startswith("aten.copy_."):
            return args[0]
        if name.startswith("aten._to_copy.") and there is not None and not on_gpu(there):
            return result
        known = {id(x.inner): x for x in tensors if isinstance(x, OnGPU)}
        return tree_map(lambda x: known.get(id(x), cls(x))
                        if isinstance(x, torch.Tensor) else x, result)


class Moved(torch.autograd.Function):
    """CPU -> GPU with gradients back."""

    @staticmethod
    def forward(ctx, x):
        return OnGPU(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.inner.clone()


def bare(x):
    return x.inner if isinstance(x, OnGPU) else x


def on_gpu(device) -> bool:
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        return False
    kind = torch.device(device).type if not isinstance(device, int) else "cuda"
    return kind in ("cuda", "pretended")


def move(x):
    if isinstance(x, OnGPU):
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return Moved.apply(x)
    return OnGPU(x.detach().clone())


def to(x, *args, **kwargs):
    """`Tensor.to` with a device or another tensor among its arguments."""
    kwargs.pop("non_blocking", None)
    for other in (*args, kwargs.get("other")):
        if isinstance(other, torch.Tensor):
            return (move(x) if isinstance(other, OnGPU) else x.cpu()).to(other.dtype)
    if any(on_gpu(a) for a in (*args, kwargs.get("device"))):
        kwargs.pop("device", None)
        rest = [a for a in args if isinstance(a, torch.dtype)]
        return move(x).to(*rest, **kwargs) if rest or kwargs else move(x)
    return x.to(*args, **kwargs)


def index_of(x):
    return OnGPU(torch.as_tensor(x)) if isinstance(x, list) or getattr(
        x, "ndim", 0) and not isinstance(x, torch.Tensor) else x


def take(x, items):
    """`x[items]`, in operations that reach `__torch_dispatch__`."""
    items = [index_of(i) for i in (items if isinstance(items, tuple) else (items,))]
    items = [int(i) if isinstance(i, torch.Tensor) and not i.ndim and i.dtype != torch.bool
             else i for i in items]
    if any(i is Ellipsis for i in items):
        used = sum(i.ndim if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1
                   for i in items if i is not None and i is not Ellipsis)
        k = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[k:k + 1] = [slice(None)] * (x.ndim - used)
    out, dim, chosen = x, 0, []
    for i in items:
        if isinstance(i, torch.Tensor):
            chosen.append(i)
            dim += i.ndim if i.dtype == torch.bool else 1
        elif i is None or isinstance(i, slice):
            if i is None:
                out = out.unsqueeze(dim)
            elif i != slice(None):
                start, stop, step = i.indices(out.shape[dim])
                out = torch.ops.aten.slice.Tensor(out, dim, start, max(start, stop), step)
            chosen.append(None)
            dim += 1
        else:
            out = out.select(dim, i.__index__())
    if any(i is not None for i in chosen):
        return torch.ops.aten.index.Tensor(out, chosen)
    return torch.ops.aten.alias.default(x) if out is x else out


def put(x, items, value):
    """`x[items] = value`."""
    if isinstance(value, torch.Tensor) and value.ndim and not isinstance(value, OnGPU):
        raise RuntimeError("a CPU tensor is assigned to a part of one on cuda:0")
    items = items if isinstance(items, tuple) else (items,)
    x.inner[tuple(bare(i) for i in items)] = bare(value)


class Pretending(TorchFunctionMode):
    """What has to be changed before torch's own C++ looks at the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, x = dict(kwargs or {}), args[0] if args else None
        if function is torch.Tensor.to:
            return to(*args, **kwargs)
        if function is torch.Tensor.backward:
            with self:  # what is computed again in there belongs to the mode, too
                kwargs.pop("gradient", None)  # of a number: one
                return torch.autograd.backward(x, **kwargs)
        if function is torch.Tensor.cuda:
            return move(x)
        if function is torch.as_tensor and isinstance(x, torch.Tensor):
            return to(x, **kwargs)  # keeps the gradient
        if isinstance(x, OnGPU):
            if function in TO_NUMPY:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use "
                                "Tensor.cpu() to copy the tensor to host memory first.")
            if function in (torch.Tensor.tolist, torch.Tensor.data_ptr):
                return function(x.inner.detach())
            if function is torch.Tensor.__getitem__:
                return take(*args)
            if function is torch.Tensor.__setitem__:
                return put(*args)
        if on_gpu(kwargs.get("device")):
            made = function(*map(bare, args), **kwargs | {"device": "cpu"})
            return OnGPU(made.detach(), made.requires_grad)
        return function(*args, **kwargs)


def empty(size, dtype=None, device=None, **_):
    return OnGPU(torch.empty(size, dtype=dtype))


def empty_strided(size, stride, dtype=None, device=None, **_):
    return OnGPU(torch.empty_strided(size, stride, dtype=dtype))


class Backend(backend_registration._DummyBackendModule):
    """What `torch.autocast` asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.float32, torch.float16, torch.bfloat16]


def install(capability: tuple[int, int] = (7, 5), memory: int = 15 * 2**30) -> None:
    """From now on this process has a GPU: by default with the numbers of a T4."""
    backend_registration._setup_privateuseone_for_python_backend("pretended", Backend())
    library = torch.library.Library("aten", "IMPL")  # what torch's C++ makes by itself
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    torch._pretended_library = library  # for as long as the process lives
    properties = types.SimpleNamespace(name=NAME, major=capability[0], minor=capability[1],
                                       total_memory=memory)
    answers = {"is_available": True, "device_count": 1, "current_device": 0,
               "get_device_name": NAME, "get_device_capability": capability,
               "get_device_properties": properties, "mem_get_info": (memory, memory),
               "memory_allocated": 0,
               "memory_reserved": 0, "max_memory_allocated": 1, "max_memory_reserved": 1,
               **dict.fromkeys(("synchronize", "empty_cache", "manual_seed", "manual_seed_all",
                                "reset_peak_memory_stats"))}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.is_bf16_supported = (  # "yes" means that it may be emulated
        lambda including_emulation=True: including_emulation or capability >= (8, 0))
    torch.autograd.set_multithreading_enabled(False)  # backward, too, where the mode holds
    Pretending().__enter__()
