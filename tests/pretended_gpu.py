"""A GPU that is none: tensors say "cuda:0" and refuse the others, the CPU computes.

Code that forgets to move a tensor works on a CPU and stops on a GPU; this finds such places on
machines without one. `install()` changes torch for the whole process, so the tests run it in
processes of their own. It knows what a tensor says about its device, what may meet (CPU numbers
of shape () in elementwise operations, CPU indices, copies), generators, and the answers of
`torch.cuda`. Not pretended: speed, memory, streams, graphs, autocast, fused optimizers, other
threads, the state of the GPU's own random numbers, and files of `torch.save`.
"""

import types

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "Pretended GPU"
CUDA = torch.device("cuda:0")
# Operations whose arguments may lie on two devices, and those that are not marked as
# elementwise but take a number of shape () from the CPU.
MEET = ("aten.copy_.", "aten._to_copy.")
INDEX = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")
NUMBERS = ("aten.fill", "aten.masked_fill", "aten.index_fill", "aten.mse_loss", "aten._foreach")
DRAWN_ON_THE_GPU = [torch.Generator().manual_seed(4711).get_state()]
LIBRARIES = []  # what they register holds for as long as they live


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
        kwargs, name = dict(kwargs or {}), str(operation)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        require_one_device(operation, name, args, tensors)
        if name.startswith("aten._fused_sdp_choice"):
            return 0  # attention written out: the kernels are chosen by device
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = "cpu"
        seeded = torch.Tag.nondeterministic_seeded in operation.tags
        call = own_draw if seeded and kwargs.get("generator") is None else run
        result = call(operation, tree_map(bare, args), tree_map(bare, kwargs))
        if name.startswith("aten.copy_."):
            return args[0]  # which may be the CPU's
        if target is not None and not on_gpu(target):
            return result
        wrappers = {id(x.inner): x for x in tensors if isinstance(x, OnGPU)}
        for x in wrappers.values():
            assert x.shape == x.inner.shape, f"{name}: cannot be pretended"

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return wrappers[id(x)] if id(x) in wrappers else cls(x)

        return tree_map(wrap, result)


def require_one_device(operation, name, args, tensors) -> None:
    """RuntimeError where CUDA raises one."""
    elementwise = torch.Tag.pointwise in operation.tags or name.startswith(NUMBERS)
    schema = operation._schema.arguments
    changed = args[0] if schema and schema[0].is_write else None
    for x in tensors:
        if isinstance(x, OnGPU) or name.startswith(MEET):
            continue
        if name.startswith(INDEX):
            if x is args[0]:
                raise RuntimeError(f"{name}: indices should be on the same device as the "
                                   "indexed tensor (cpu)")
            if not any(x is i for i in args[1]) and x.ndim:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        elif x.ndim or not elementwise or x is changed:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but "
                               "found at least two devices, cuda:0 and cpu")


def run(function, args, kwargs):
    return function(*args, **kwargs)


def own_draw(function, args, kwargs):
    """Random numbers of the GPU's own: others than the CPU's from the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(DRAWN_ON_THE_GPU[0])
        result = function(*args, **kwargs)
        DRAWN_ON_THE_GPU[0] = torch.get_rng_state()
    return result


class Moved(torch.autograd.Function):
    """CPU -> GPU with gradients back."""

    @staticmethod
    def forward(ctx, x):
        return OnGPU(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return bare(gradient).clone()


def bare(x):
    return x.inner if isinstance(x, OnGPU) else x


def on_gpu(device) -> bool:
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        return False
    device = CUDA if device == 0 else torch.device(device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError(f"invalid device ordinal: {device}")
    return device.type in ("cuda", "pretended")


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


def tensors_in(items) -> bool:
    return any(isinstance(i, list) or getattr(i, "ndim", 0) for i in items)


def take(x, items):
    """`x[items]`, in operations that reach `__torch_dispatch__`."""
    items = [torch.as_tensor(i) if tensors_in([i]) else i
             for i in (items if isinstance(items, tuple) else (items,))]
    items = [int(i) if isinstance(i, torch.Tensor) and not i.ndim and i.dtype != torch.bool
             else i for i in items]
    if any(isinstance(i, bool) for i in items):
        raise NotImplementedError("an index of True or False")
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
    """`x[items] = value`: copied across devices, unless the items hold tensors."""
    items, given = items if isinstance(items, tuple) else (items,), torch.is_tensor(value)
    if not tensors_in(items):
        part = take(x, items)
        _ = part.copy_(value) if given else part.fill_(value)
        return
    if given and value.ndim and not isinstance(value, OnGPU):
        raise RuntimeError("index_put_: expected all tensors to be on the same device")
    if torch.is_grad_enabled() and (x.requires_grad or given and value.requires_grad):
        raise NotImplementedError("gradients through an assignment by tensors")
    x.inner[tuple(bare(i) for i in items)] = bare(value)


class Generator(torch.Generator):
    """One that says where it draws."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.there = CUDA if on_gpu(device) else torch.device("cpu")
        return made

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: self.there)


class Pretending(TorchFunctionMode):
    """What has to be changed before torch's own C++ looks at the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, x = dict(kwargs or {}), args[0] if args else None
        made_on_gpu, generator = on_gpu(kwargs.get("device")), kwargs.get("generator")
        if generator is not None and on_gpu(generator.device) != (
                made_on_gpu or any(isinstance(a, OnGPU) for a in args)):
            raise RuntimeError("expected a generator on the same device as the tensor, found "
                               f"one on {generator.device}")
        if function is torch.Tensor.to:
            return to(*args, **kwargs)
        if function is torch.Tensor.cuda:
            return move(x)
        if function is torch.as_tensor and isinstance(x, torch.Tensor):
            return to(x, **kwargs)  # keeps the gradient
        if isinstance(x, OnGPU):
            if function in TAKEN_OVER:
                return TAKEN_OVER[function](x, *args[1:], **kwargs)
            if function == torch.Tensor.data.__set__:  # == : each look makes a new one
                function(*args)
                x.inner = args[1].inner
                return None
        if made_on_gpu:
            draws = generator is None and function.__name__.startswith(("rand", "normal"))
            made = (own_draw if draws else run)(
                function, tree_map(bare, args), kwargs | {"device": "cpu"})
            return OnGPU(made.detach(), made.requires_grad)
        return function(*args, **kwargs)


def no_numpy(x, *args, force=False, **kwargs):
    if force:
        return x.inner.detach().numpy()
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy "
                    "the tensor to host memory first.")


TAKEN_OVER = {
    torch.Tensor.numpy: no_numpy, torch.Tensor.__array__: no_numpy,
    torch.Tensor.tolist: lambda x: x.inner.detach().tolist(),
    torch.Tensor.data_ptr: lambda x: x.inner.data_ptr(),
    torch.Tensor.__format__: lambda x, form: format(x.inner.detach() if not x.ndim else repr(x),
                                                    form),
    torch.Tensor.__getitem__: take, torch.Tensor.__setitem__: put,
}


def empty(size, dtype=None, memory_format=None, **_):
    return OnGPU(torch.empty(size, dtype=dtype, memory_format=memory_format))


def empty_strided(size, stride, dtype=None, **_):
    return OnGPU(torch.empty_strided(size, stride, dtype=dtype))


class Backend(backend_registration._DummyBackendModule):
    """What the checkpointing of `torch.utils` asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.float32, torch.float16, torch.bfloat16]


def install(capability: tuple[int, int] = (7, 5), memory: int = 15 * 2**30) -> None:
    """From now on this process has a GPU: by default with the numbers of a T4."""
    backend_registration._setup_privateuseone_for_python_backend("pretended", Backend())
    LIBRARIES.append(torch.library.Library("aten", "IMPL"))  # what torch's C++ makes by itself
    LIBRARIES[0].impl("empty.memory_format", empty, "PrivateUse1")
    LIBRARIES[0].impl("empty_strided", empty_strided, "PrivateUse1")
    properties = types.SimpleNamespace(name=NAME, major=capability[0], minor=capability[1],
                                       total_memory=memory)
    answers = {"is_available": True, "device_count": 1, "current_device": 0,
               "get_device_name": NAME, "get_device_capability": capability,
               "get_device_properties": properties, "mem_get_info": (memory, memory),
               "memory_allocated": 0, "memory_reserved": 0,
               "max_memory_allocated": 1, "max_memory_reserved": 1,  # some memory, at the peak
               **dict.fromkeys(("synchronize", "empty_cache", "manual_seed", "manual_seed_all",
                                "reset_peak_memory_stats"))}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.is_bf16_supported = (  # "yes" means that it may be emulated
        lambda including_emulation=True: including_emulation or capability >= (8, 0))
    torch.Generator = Generator
    torch.autograd.set_multithreading_enabled(False)  # backward, too, where the mode holds
    mode, engine = Pretending(), torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        with mode:  # what backward computes again is pretended, too
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward
    mode.__enter__()
