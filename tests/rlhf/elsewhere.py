"""Clips on another device than the judges', on a machine that has one device only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Away(Tensor):
    """A tensor that says it lies on another device ("meta") and has values all the same: it refuses to be mixed with tensors that lie on
    the CPU, as one on a GPU does, and `.to("cpu")` brings its values back. What is made new on its device has none."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        made: Away = torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device="meta")  # type: ignore[attr-defined]
        made.here = here
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], Away):  # torch would put a list of indices on "meta", without its values
            return Away(args[0].here[args[1]])
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return func(args[0].here, **kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, Away) and leaf.device.type == "cpu" and leaf.ndim:
                raise RuntimeError(f"{func}: tensors on two devices")
        kwargs.pop("device", None)
        out = func(*tree_map(lambda x: x.here if isinstance(x, Away) else x, args), **kwargs)
        return tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, out)
