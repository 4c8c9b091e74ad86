"""A second device where there is none: pytest --second-device -k cuda, with the kernels simulated on the CPU.

On a GPU a test that takes `backend` makes its tensors there, and a call that gets some from there and some from the
host fails. Here all are on the CPU, and DEVICE is another name of it: tensors that are made on the device of this name,
and what is computed from them, are remembered by their storage and say that it is their device. Calls in Python are
seen, not what compiled graphs and other threads do.
"""

import pytest
import torch
from torch._C import _functorch as functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu:0")
MAKES = _device_constructors()
# Calls that move numbers from one device to another, or tensors without a look at their numbers; grad, because
# torch's own checks pass it tensors that are not marked.
MOVES = {"copy_", "set_", "__set__", "swap_tensors", "_make_subclass", "_has_compatible_shallow_copy_type", "grad"}
TRACED = "what is traced or compiled is not seen"
AGAIN = "tensors that autograd computes again, or that were pickled, do not say where they are"
BATCHED = "what torch's own checks compute inside of vmap to compare with does not say where it is"
# Tests that run without this check, and why.
UNSEEN = {
    "tests/test_compile.py": TRACED,
    "test_compile": TRACED,
    "test_boundaries_without_values": TRACED,
    "test_autocast_and_checkpoint": AGAIN,
    "test_copies_and_checkpoints": AGAIN,
    "test_gradients.py::test_gradcheck[": BATCHED,
    "test_gradients.py::test_gradgradcheck[": BATCHED,
}


class WrongDevice(RuntimeError):
    """A call that a GPU would refuse."""


def storage_of(tensor):
    """None for what has no numbers: on device meta, and where calls are only traced."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None
    return storage if storage.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter) else None


class SecondDevice(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.storages = {}  # an address is not used again while there is a weak reference to what was there
        self.refused = []

    def device_of(self, tensor):
        storage = storage_of(tensor)
        return None if storage is None else DEVICE if storage._cdata in self.storages else torch.device("cpu")

    def put(self, results, but=()):
        """The results are on the second device, except those that share the storage of a tensor of `but`."""
        others = {storage._cdata for storage in map(storage_of, but) if storage is not None}
        for tensor in tree_leaves(results):
            storage = storage_of(tensor) if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in others:
                self.storages[storage._cdata] = StorageWeakRef(storage)
        return results

    def refuse(self, what):
        self.refused.append(what)
        raise WrongDevice(what)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func == torch.Tensor.device.__get__:
            return self.device_of(args[0]) or func(*args)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func in MAKES:
            return self.made(func, tensors, args, kwargs)
        if name in ("to", "cpu"):
            return self.moved(func, args, kwargs)
        here = [t for t in tensors if self.device_of(t) == DEVICE]
        host = [t for t in tensors if self.device_of(t) == torch.device("cpu")]
        if name in ("numpy", "__array__") and here:
            self.refuse(f"{name} of a tensor on the device")
        if here and kwargs.get("generator") is not None:
            self.refuse(f"{name} with a generator of the host")
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "convkernels" and "cuda" in func._overloadname:
            if host:
                self.refuse(f"{func} got tensors of the host: {[tuple(t.shape) for t in host]}")
        elif here and name not in MOVES and any(t.dim() for t in host):
            # A number of the host goes everywhere, and so do indices and what is assigned.
            if name not in ("__getitem__", "__setitem__") or self.device_of(args[0]) != DEVICE:
                self.refuse(f"{name} got tensors of both devices")
        results = func(*args, **kwargs)
        return self.put(results, but=tensors) if here else results

    def made(self, func, sources, args, kwargs):
        """A constructor, of a tensor where none is named on the default device."""
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        if device == DEVICE and kwargs.get("generator") is not None:
            self.refuse(f"{func.__name__} with a generator of the host")
        return self.arrived(func(*args, **kwargs), sources, device)

    def moved(self, func, args, kwargs):
        """Tensor.to and Tensor.cpu: a device, text, another tensor, or neither, which leaves it where it is."""
        source, target = args[0], kwargs.get("device", args[1] if len(args) > 1 else None)
        if func.__name__ == "cpu":
            device = torch.device("cpu")
        elif isinstance(target, torch.Tensor):
            device = self.device_of(target)
        else:
            device = torch.device(target) if isinstance(target, (str, torch.device)) else self.device_of(source)
        return self.arrived(func(*args, **kwargs), [source], device)

    def arrived(self, result, sources, device):
        """The result on the device, a copy where it was on another."""
        if storage_of(result) is None or self.device_of(result) == device:
            return result
        if any(result.data_ptr() == source.data_ptr() for source in sources):
            result = result.clone()
        return self.put(result) if device == DEVICE else result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    case = getattr(item, "callspec", None)
    if case is None or case.params.get("backend") != "cuda" or any(part in item.nodeid for part in UNSEEN):
        return (yield)
    with SecondDevice() as item.second_device:
        return (yield)


def pytest_terminal_summary(terminalreporter):
    for reason in dict.fromkeys(UNSEEN.values()):
        parts = ", ".join(part for part, other in UNSEEN.items() if other == reason)
        terminalreporter.write_line(f"not watched: {parts}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """What was refused is wrong, also where the test has caught it."""
    result = yield
    device = getattr(pyfuncitem, "second_device", None)
    if device and device.refused:
        pytest.fail("\n".join(dict.fromkeys(device.refused)))
    return result
