"""Communication of ranks by torch.distributed: NCCL where each rank has a GPU of its own, gloo elsewhere."""

from __future__ import annotations

import ctypes
import os
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from trimtab.compiler.targets.sessions import providers
from trimtab.passes.errors import TargetError
from trimtab.passes.optional import import_optional

if TYPE_CHECKING:
    import torch

LOCAL = "127.0.0.1"


def timeout_s() -> float:
    """Seconds that a rank waits for another rank; TRIMTAB_SHARD_TIMEOUT overrides the default."""
    return float(os.environ.get("TRIMTAB_SHARD_TIMEOUT", "300"))


def require_torch() -> Any:
    """The module torch.distributed.

    Raises:
        TargetError: it is not installed.
    """
    distributed = import_optional("torch.distributed", TargetError, what="a model in shards", extra="shards")
    if not distributed.is_available():
        raise TargetError("this torch has no torch.distributed", hint="install another build of torch")
    return distributed


class Group:
    """The group of the ranks of one engine.

    Args:
        process_group: a process group of torch.distributed.
        device: device of the tensors that the group takes, such as "cpu" or "cuda:1".
    """

    def __init__(self, process_group: Any, device: str) -> None:
        self.device = device
        self.rank, self.size = int(process_group.rank()), int(process_group.size())
        self._groups = [process_group]
        # A thread of gloo may keep a call's tensors a little longer than the call. If it frees them while Python
        # exits, the process aborts (torch 2.x), so the group and its threads end first: finalizers run at exit, too.
        weakref.finalize(self, _end, self._groups)

    @property
    def _group(self) -> Any:
        if not self._groups:
            raise TargetError(
                "the ranks' group is closed, as this process ends", hint="run the engine before exit handlers"
            )
        return self._groups[0]

    @classmethod
    def of_store(cls, store: Any, rank: int, size: int) -> Group:
        """A new group, separate from any default group of the process. Waits for the other ranks."""
        distributed, timeout, device = require_torch(), timedelta(seconds=timeout_s()), device_of(rank, size)
        if device.startswith("cuda"):
            import torch

            torch.cuda.set_device(device)
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return cls(distributed.ProcessGroupNCCL(store, rank, size, options), device)
        options = distributed.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=LOCAL)]
        return cls(distributed.ProcessGroupGloo(store, rank, size, options), device)

    @classmethod
    def of_launcher(cls, size: int) -> Group:
        """A new group of all processes of torchrun or another launcher, separate from their default group.

        Raises:
            TargetError: the number of processes is not `size`.
        """
        distributed = require_torch()
        world = int(os.environ["WORLD_SIZE"])
        if world != size:
            raise TargetError(
                f"the build has {size} shards, and WORLD_SIZE is {world}", hint=f"torchrun --nproc-per-node {size} ..."
            )
        device = device_of(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), size)
        backend, timeout = "nccl" if device.startswith("cuda") else "gloo", timedelta(seconds=timeout_s())
        if not distributed.is_initialized():
            distributed.init_process_group(backend, timeout=timeout)
        return cls(distributed.new_group(backend=backend, timeout=timeout), device)

    def sum(self, value: ort.OrtValue) -> None:
        """Replace `value`, in place, by the sum over all ranks."""
        self._group.allreduce([_tensor(value)]).wait()
        self._settle()

    def concat(self, value: ort.OrtValue) -> np.ndarray:
        """The values of all ranks side by side along the last axis."""
        import torch

        own = _tensor(value)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._group.allgather([parts], [own]).wait()
        self._settle()
        joined: np.ndarray = torch.cat(parts, -1).cpu().numpy()
        return joined

    def same(self, digest: str) -> bool:
        """Whether all ranks pass the same hash, in hexadecimal digits."""
        import torch

        own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self.device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._group.allgather([parts], [own]).wait()
        self._settle()
        return all(torch.equal(part, own) for part in parts)

    def _settle(self) -> None:
        """Wait for torch's CUDA stream: ONNX Runtime has a stream of its own, which does not wait for it."""
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


def _end(groups: list[Any]) -> None:
    group = groups.pop()  # dropping the last reference joins the threads
    with suppress(ValueError):  # torch.distributed lists only launchers' groups, while its default group exists
        require_torch().destroy_process_group(group)


def launched() -> bool:
    """Whether a launcher such as torchrun has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def device_of(rank: int, size: int) -> str:
    """The device of `rank`: a GPU where ONNX Runtime uses GPUs and each rank has one; else the CPU."""
    if "CUDAExecutionProvider" not in providers():
        return "cpu"
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() and torch.cuda.device_count() >= size else "cpu"


def _tensor(value: ort.OrtValue) -> torch.Tensor:
    """The memory of `value` as a torch tensor, without a copy."""
    import torch

    half = value.data_type() == "tensor(float16)"
    shape = tuple(value.shape())
    if value.device_name() != "cpu":
        return torch.as_tensor(_OnGPU(value, shape, "<f2" if half else "<f4"), device="cuda")
    size = (2 if half else 4) * int(np.prod(shape))
    memory = memoryview((ctypes.c_char * size).from_address(value.data_ptr()))
    return torch.frombuffer(memory, dtype=torch.float16 if half else torch.float32).reshape(shape)


class _OnGPU:
    """Describes GPU memory of ONNX Runtime to torch, through the CUDA array interface."""

    def __init__(self, value: ort.OrtValue, shape: tuple[int, ...], kind: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": kind, "data": (value.data_ptr(), False), "version": 3,
        }  # fmt: skip
