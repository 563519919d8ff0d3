"""What the component tests share: an oracle that is not torch, and the rule for low precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

quick = settings(deadline=None, max_examples=40)


def onnx_reference(op: str, inputs: dict[str, Tensor | None], **attributes: Any) -> Tensor:
    """Run one operator of opset 23 in ONNX's reference implementation (numpy)."""
    given = {name: value for name, value in inputs.items() if value is not None}
    node = helper.make_node(op, [name if name in given else "" for name in inputs], ["out"], **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info(name, _onnx_type(value), list(value.shape)) for name, value in given.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    (out,) = ReferenceEvaluator(model).run(None, {name: value.numpy() for name, value in given.items()})
    return torch.from_numpy(np.asarray(out))


def _onnx_type(value: Tensor) -> int:
    return int(helper.np_dtype_to_tensor_dtype(value.numpy().dtype))


def assert_as_precise(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype
) -> None:
    """``err(ours) <= 2 * err(plain torch)`` in ``dtype``, both against plain torch in float32."""
    low = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    exact = plain(*[x.float() if x.is_floating_point() else x for x in low])
    error, floor = [(f(*low).float() - exact).abs() for f in (ours, plain)]
    assert error.max() <= 2 * floor.max() + 1e-7
    assert error.mean() <= 2 * floor.mean() + 1e-8
