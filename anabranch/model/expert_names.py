"""What a checkpoint calls a layer's experts: one tensor for all, or one for each, under either family's names."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.model.loader import WeightLoader


@dataclass(frozen=True)
class ExpertNames:
    """Tensor names of one layer.

    Attributes:
        gate: the gate's weight `[E, C]`.
        gate_proj, up_proj, down_proj: with `{}` for the expert's number; or, `fused`, tensors of all experts
            `[E, 2F, C]` (gate rows, then up rows) and `[E, C, F]`.
    """

    gate: str
    gate_proj: str
    up_proj: str
    down_proj: str
    fused: bool = False


def expert_names(loader: WeightLoader, layer: int) -> ExpertNames:
    """The names that this checkpoint uses; the common ones, so that the message says what is missing, if none."""
    prefix = f"model.layers.{layer}"
    gates = (f"{prefix}.mlp.gate.weight", f"{prefix}.block_sparse_moe.gate.weight")
    gate = next((name for name in gates if loader.has(name)), gates[0])
    fused = f"{prefix}.mlp.experts.gate_up_proj"
    if loader.has(fused):
        return ExpertNames(gate, fused, fused, f"{prefix}.mlp.experts.down_proj", fused=True)
    mixtral = f"{prefix}.block_sparse_moe.experts."
    if loader.has(f"{mixtral}0.w1.weight"):
        return ExpertNames(gate, f"{mixtral}{{}}.w1.weight", f"{mixtral}{{}}.w3.weight", f"{mixtral}{{}}.w2.weight")
    each = f"{prefix}.mlp.experts.{{}}."
    return ExpertNames(gate, f"{each}gate_proj.weight", f"{each}up_proj.weight", f"{each}down_proj.weight")
