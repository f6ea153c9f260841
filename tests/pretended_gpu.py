"""A pytest plug-in that pretends there is a GPU: ``pytest -p tests.pretended_gpu tests/conformance``.

Its tensors say that they are on a device that is not the CPU, and compute on the CPU. As on a GPU, an operation on tensors of two
devices is refused (but for numbers, indices and copies). So what forgets a device is found where no GPU is; what kernels do, speed
and memory are not, and of autograd and inference mode only so much as the suites but that of exported models need.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from selfpruner.models import loading

# A device of torch's for backends made elsewhere: this torch has no CUDA's, and that one's name is CUDA's own.
GPU = torch.device("privateuseone:0")
aten = torch.ops.aten
# They take tensors of two devices also on a GPU.
COPIES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class GpuTensor(Tensor):
    """A tensor of the CPU that says it is on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> GpuTensor:
        made: GpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; what comes out is on the GPU if what went in was, or if that was asked for."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Dispatched():  # inference mode leaves it in one piece
            return func.decompose(*args, **kwargs)
    flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in flat if isinstance(value, GpuTensor)]
    if there and func not in COPIES:
        operands = [args[0]] if func in INDEXED else flat
        for value in operands:
            if not isinstance(value, GpuTensor) and value.dim():
                raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {GPU} and cpu")
    asked = kwargs.get("device")
    if kwargs.get("generator") is not None and (there or (asked and asked.type == GPU.type)):
        raise RuntimeError("Expected a 'privateuseone' device type for generator but found 'cpu'")
    gpu = asked.type == GPU.type if asked is not None else bool(there) and func is not aten._local_scalar_dense.default
    if func in (aten.copy_.default, aten.set_.source_Tensor):
        gpu = isinstance(args[0], GpuTensor)
    plain = {**kwargs, **({"device": torch.device("cpu")} if gpu and asked is not None else {})}
    plain.pop("pin_memory", None)
    place = {id(value.held): value for value in there}
    out = func(*tree_map(_inner, args), **tree_map(_inner, plain))

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or not gpu:
            return value
        before = place.get(id(value))
        return GpuTensor(value) if before is None or before.shape != value.shape else before

    return tree_map(outer, out)


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, GpuTensor) else value


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """What makes tensors of Python's numbers asks for the device below the dispatcher: it is made here and sent there."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == GPU.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if func is Tensor.new_tensor and isinstance(args[0], GpuTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(GPU)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            place = args[1] if isinstance(args[1], tuple) else (args[1],)
            return func(
                args[0],
                tuple(torch.tensor(i, dtype=None if i else torch.long) if isinstance(i, list) else i for i in place),
                *args[2:],
            )
        if func.__name__ in ("matmul", "__matmul__") and isinstance(args[0], GpuTensor) and args[0].dim() == 1 < args[1].dim():
            return (args[0][None] @ args[1]).squeeze(-2)  # torch's own squeezes in place, unseen by the dispatcher
        if func is Tensor.tolist:
            return args[0].cpu().tolist() if isinstance(args[0], GpuTensor) else func(*args)
        return func(*args, **kwargs)


@pytest.fixture(autouse=True, scope="session")
def pretended_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "choose_device", torch.device)
        with Made(), Dispatched():
            yield


_setup_privateuseone_for_python_backend()
os.environ.setdefault("SELFPRUNER_TEST_DEVICE", str(GPU))
