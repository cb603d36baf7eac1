"""Fusion of a norm and the addition before it into one ONNX Runtime operator, since each small node has a cost.

ONNX Runtime's own optimiser fuses a norm, but not together with the addition.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, pattern, rewrite

_DOMAIN, _FUSED = "com.microsoft", "SkipSimplifiedLayerNormalization"


class _SkipNorm(pattern.RewriteRuleClassBase):
    """Replaces s = a + b; weight * (s / sqrt(mean(s ** 2) + eps)) by one node that returns the norm and s."""

    def pattern(  # type: ignore[override]
        self, op: Any, a: ir.Value, b: ir.Value, weight: ir.Value, two: ir.Value, axes: ir.Value, eps: ir.Value
    ) -> Any:
        total = op.Add(a, b)
        mean = op.ReduceMean(op.Pow(total, two), axes, _allow_other_attributes=True)
        return op.Mul(weight, op.Div(total, op.Sqrt(op.Add(mean, eps)))), total

    def check(self, op: Any, *args: Any, **values: Any) -> MatchResult:
        result = MatchResult()
        if not values["weight"].is_initializer() or values["weight"].dtype != ir.DataType.FLOAT:
            return result.fail("not a float32 norm")
        if (_number(values["two"]), _number(values["axes"])) != (2.0, -1.0) or _number(values["eps"]) is None:
            return result.fail("not the mean square over the last dimension")
        return result

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, weight: ir.Value, eps: ir.Value, **_: ir.Value) -> Any:  # type: ignore[override]
        *module, _suffix = str(weight.name).removeprefix("model.").split(".")
        path = "/".join(part for part in (".".join(module[:-1]), module[-1], _FUSED) if part)
        names = [f"{path}.out", f"{path}.out1", f"{path}.out2", f"{path}.out3"]
        normed, _mean, _scale, total = op.SkipSimplifiedLayerNormalization(
            a, b, weight, epsilon=_number(eps), _domain=_DOMAIN, _outputs=names
        )
        normed.producer().name = f"/{path}"
        return normed, total


def fuse_norms(model: ir.Model) -> None:
    """Fuse every float32 norm of a sum, in place."""
    rewrite(model, pattern_rewrite_rules=[_SkipNorm.rule()])
    model.opset_imports.setdefault(_DOMAIN, 1)


def _number(value: ir.Value) -> float | None:
    """Return the element of a constant with one element; None for other values."""
    tensor = value.const_value
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
