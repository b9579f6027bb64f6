"""What the parity tests share: random weights, one measure of error, strict loading."""

import math
import zlib

import numpy as np
import torch
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter of `module` with random numbers and put it in eval mode.

    Freshly made networks hide mistakes: biases are 0, norms multiply by 1, and zero-filled
    layers switch whole branches off. Here every tensor is random, norms and biases
    included. Weights are scaled by fan-in, so that activations neither vanish nor explode.
    Each tensor depends on `seed`, its own name and its shape only, so two modules whose
    names agree receive the same numbers. Returns the module.
    """
    embeddings = {
        f"{name}.weight" if name else "weight"
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding)
    }
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{seed}:{name}".encode()) + (seed << 32)
        )
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        last = name.rsplit(".", 1)[-1]
        if last.endswith("bias"):
            value = 0.2 * noise
        elif parameter.ndim == 0 or (parameter.ndim == 1 and last == "weight"):
            value = 1 + 0.25 * noise  # the scale of a norm, or a lone scalar
        elif parameter.ndim == 1 or name in embeddings:
            value = 0.5 * noise
        else:
            value = noise / math.sqrt(math.prod(parameter.shape[1:]))
        with torch.no_grad():
            parameter.copy_(value)
    return module.eval()


def as_float64(x) -> np.ndarray:
    """Tensor, array, number or list to a float64 array (complex numbers to pairs)."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        if x.is_complex():
            x = torch.view_as_real(x)
        x = x.double().numpy()
    return np.asarray(x, dtype=np.float64)


def relative_error(a, b) -> float:
    """max|a - b| / max|b|; `b` is the reference. Shapes must agree; NaN gives infinity."""
    a, b = as_float64(a), as_float64(b)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    scale = np.abs(b).max() if b.size else 0.0
    assert scale > 0, "the reference is empty or all zero: it proves nothing"
    error = np.abs(a - b).max() / scale
    return float(error) if math.isfinite(error) else math.inf


def shapes(module_or_state) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that would be saved."""
    state = module_or_state
    if isinstance(state, nn.Module):
        state = state.state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def load_into(ours: nn.Module, reference_state) -> nn.Module:
    """Copy a reference's weights (a module or a state dict) into `ours`.

    Strict: every name and shape must agree, and the message lists those that do not.
    Tensors are copied, so that spoiling one side leaves the other alone. Returns `ours`
    in eval mode.
    """
    if isinstance(reference_state, nn.Module):
        reference_state = reference_state.state_dict()
    mine, theirs = shapes(ours), shapes(reference_state)
    problems = [f"missing in ours: {name}" for name in sorted(theirs.keys() - mine.keys())]
    problems += [f"only in ours: {name}" for name in sorted(mine.keys() - theirs.keys())]
    problems += [
        f"{name}: ours {mine[name]}, theirs {theirs[name]}"
        for name in sorted(mine.keys() & theirs.keys())
        if mine[name] != theirs[name]
    ]
    assert not problems, "\n".join(problems)
    ours.load_state_dict({name: value.clone() for name, value in reference_state.items()})
    return ours.eval()
