"""State that a loss keeps from step to step, and that is saved with it, without being buffers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Stateful(nn.Module):
    """A module with state beside parameters and buffers, which it names in ``STATE``.

    Tensors follow the module's device and are in its ``state_dict``; whole numbers stay in the host's memory, where
    reading them waits for no device, and are saved as tensors. None of it is a buffer, since buffers are taken for parts
    of a model: ``DistributedDataParallel`` overwrites every process's with the first one's (and NCCL has no way to do so
    with those in host memory), ``torch.optim.swa_utils.AveragedModel`` copies them into tensors of the shape that they had
    when the copy was made.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    ADDED: ClassVar[tuple[str, ...]] = ()  # of those, what state_dicts of earlier versions lack

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        module = super()._apply(fn, recurse)
        for name in self.STATE:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved = fn(value)
                setattr(self, name, moved if value.is_floating_point() else moved.to(value.dtype))
        return module

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.STATE:
            destination[prefix + name] = torch.as_tensor(getattr(self, name))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        names = {prefix + name: name for name in self.STATE}
        for key, name in names.items():
            if key in state_dict:
                self._take(name, state_dict[key])
            elif name not in self.ADDED:
                missing_keys.append(key)
        others = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, *rest)

    def _take(self, name: str, saved: Tensor) -> None:
        """Set what was saved under a name, a tensor in its own type on the module's device."""
        current = getattr(self, name)
        setattr(self, name, saved.detach().to(current.device, copy=True) if isinstance(current, Tensor) else int(saved))
