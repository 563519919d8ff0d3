"""Imports the program and evaluates the user's expressions in it. Only ever run in a child process."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.verify.request import Request, Target
from modernizer.verify.tensors import leaves, rebuild

SEED = 20_240_229


class Subject:
    """One program's model, ready to be called again and again on the same inputs."""

    def __init__(self, model: nn.Module, inputs: Any, call: str | None, scope: dict[str, Any]) -> None:
        self.model = model
        self.inputs = inputs
        self._call = None if call is None else compile(call, "<call>", "eval")
        self._scope = scope

    @classmethod
    def load(cls, request: Request) -> Subject:
        """Imports, builds and readies the model: eval mode, all its randomness seeded."""
        torch.manual_seed(SEED)
        scope = namespace(import_target(request.target))
        torch.manual_seed(SEED)
        model = eval(request.model, scope)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{request.model} is a {type(model).__name__}, not a torch module")
        torch.manual_seed(SEED + 1)
        return cls(model.eval(), eval(request.inputs, scope), request.call, scope)

    def output(self, inputs: Any = None, seed: int = SEED) -> Any:
        """What the call gives, as it is."""
        inputs = self.inputs if inputs is None else inputs
        # A model that works in place must not change what the next call gets.
        inputs = rebuild(inputs, lambda _, tensor: tensor.detach().clone())
        torch.manual_seed(seed)
        if self._call is not None:
            return eval(self._call, {**self._scope, "model": self.model, "inputs": inputs})
        if isinstance(inputs, dict):
            return self.model(**inputs)
        if isinstance(inputs, tuple | list):
            return self.model(*inputs)
        return self.model(inputs)

    def tensors(self, inputs: Any = None, seed: int = SEED) -> list[Tensor]:
        """All tensors in the output, without a graph."""
        with torch.no_grad():
            found = leaves(self.output(inputs, seed))
        if not found:
            raise TypeError("the output holds no tensor")
        return [tensor.detach() for tensor in found]

    def main(self, inputs: Any = None, seed: int = SEED) -> Tensor:
        """The output tensor that is looked at: the first with real numbers in it, else the first."""
        return main_of(self.tensors(inputs, seed))

    def cast(self, dtype: torch.dtype) -> None:
        """Turns the model and its inputs with real numbers to another precision."""
        self.model.to(dtype)
        self.inputs = rebuild(self.inputs, lambda _, t: t.to(dtype) if t.is_floating_point() else t)


def main_of(tensors: list[Tensor]) -> Tensor:
    """The tensor of an output that is looked at, see `Subject.main`."""
    return next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])


def import_target(target: Target) -> Any:
    """The module that `target` names, imported as its own users import it."""
    sys.path.insert(0, target.root)
    if target.module not in sys.modules and (target.file is None or target.module.isidentifier()):
        return importlib.import_module(target.module)
    if target.file is None:
        raise ImportError(f"{target.module} is the name of a module that torch or Python has loaded already")
    # A file called like something that is loaded already, or like no module at all, can still be loaded by its path.
    spec = importlib.util.spec_from_file_location("modernizer_target", target.file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["modernizer_target"] = module
    spec.loader.exec_module(module)
    return module


def namespace(module: Any) -> dict[str, Any]:
    """What the expressions may use: the module's own names first, then torch, nn, F and math."""
    return {"torch": torch, "nn": nn, "F": F, "math": math, **vars(module), "__builtins__": builtins}
