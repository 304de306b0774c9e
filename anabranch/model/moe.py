"""Mixture of experts: the gate, which belongs to the attention half, and the experts, which do not.

Shape suffixes: T tokens, C hidden, F features, E experts, S chosen experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from anabranch.kernels.base import Kernels
from anabranch.model.expert_names import ExpertNames, expert_names
from anabranch.model.ffn_half import DenseFfn, FfnInput
from anabranch.model.loader import WeightLoader
from anabranch.parallel.group import Group
from anabranch.parallel.split import split_range


class Gate:
    """Chooses each token's experts: softmax over all, then the likeliest, as transformers does."""

    def __init__(self, loader: WeightLoader, kernels: Kernels, layer: int) -> None:
        moe = loader.config.moe
        assert moe is not None
        names = expert_names(loader, layer)
        self.weight_EC = loader.whole(names.gate, moe.num_experts, loader.config.hidden_size)
        self._linear = kernels.linear
        self._top_k = moe.top_k
        self._normalise = moe.norm_topk_prob

    def forward(self, normed_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, C] -> (weights [T, S] float32, experts [T, S] int64)`."""
        logits_TE = self._linear(normed_TC, self.weight_EC, None)
        weights_TS, experts_TS = functional.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(self._top_k, dim=-1)
        if self._normalise:
            weights_TS = weights_TS / weights_TS.sum(dim=-1, keepdim=True)
        return weights_TS, experts_TS


class MoeFfn:
    """Experts of a layer, each sliced by rank along its features, and the shared expert if there is one.

    Args:
        experts: ids of those that are held; None: all. What a token's other choices would add is left out.
    """

    def __init__(
        self,
        loader: WeightLoader,
        kernels: Kernels,
        group: Group,
        layer: int,
        experts: Sequence[int] | None = None,
    ) -> None:
        config = loader.config
        moe = config.moe
        assert moe is not None
        held = split_range(moe.expert_intermediate, group.size, group.rank)
        self.experts = tuple(range(moe.num_experts) if experts is None else experts)
        self.gate_up_EFC = loader.empty(len(self.experts), 2 * len(held), config.hidden_size)
        self.down_ECF = loader.empty(len(self.experts), config.hidden_size, len(held))
        self._fill(loader, expert_names(loader, layer), held)
        self._place_of_E: torch.Tensor | None = None
        if self.experts != tuple(range(moe.num_experts)):
            self._place_of_E = torch.full((moe.num_experts,), -1, dtype=torch.int64, device=loader.device)
            self._place_of_E[list(self.experts)] = torch.arange(len(self.experts), device=loader.device)
        self.shared: DenseFfn | None = None
        if moe.shared_expert_intermediate:
            prefix = f"model.layers.{layer}.mlp"
            self.shared = DenseFfn(
                loader,
                kernels,
                group,
                f"{prefix}.shared_expert",
                moe.shared_expert_intermediate,
                bias=False,
                reduce=False,
            )
            self.shared_gate_1C = loader.whole(f"{prefix}.shared_expert_gate.weight", 1, config.hidden_size)
        self._kernels = kernels
        self._group = group if group.size > 1 else None

    def _fill(self, loader: WeightLoader, names: ExpertNames, held: range) -> None:
        assert loader.config.moe is not None
        features, hidden = loader.config.moe.expert_intermediate, loader.config.hidden_size
        count = len(held)
        rows = slice(held.start, held.stop)
        for place, expert in enumerate(self.experts):
            gate_FC, up_FC = self.gate_up_EFC[place, :count], self.gate_up_EFC[place, count:]
            down_CF = self.down_ECF[place]
            if names.fused:
                one = slice(expert, expert + 1)
                gate_up_shape = (loader.config.moe.num_experts, 2 * features, hidden)
                down_shape = (loader.config.moe.num_experts, hidden, features)
                up_rows = slice(features + held.start, features + held.stop)
                every = slice(None)
                loader.fill(gate_FC.unsqueeze(0), names.gate_proj, gate_up_shape, (one, rows, every))
                loader.fill(up_FC.unsqueeze(0), names.up_proj, gate_up_shape, (one, up_rows, every))
                loader.fill(down_CF.unsqueeze(0), names.down_proj, down_shape, (one, every, rows))
            else:
                every = slice(None)
                loader.fill(gate_FC, names.gate_proj.format(expert), (features, hidden), (rows, every))
                loader.fill(up_FC, names.up_proj.format(expert), (features, hidden), (rows, every))
                loader.fill(down_CF, names.down_proj.format(expert), (hidden, features), (every, rows))

    def forward(self, rows: FfnInput) -> torch.Tensor:
        """See `FfnHalf.forward`; one all-reduce for the chosen experts and the shared one together."""
        normed_TC, weights_TS, experts_TS = rows
        assert weights_TS is not None
        assert experts_TS is not None
        if self._place_of_E is not None:
            experts_TS = self._place_of_E[experts_TS]
        out_TC = self._kernels.experts(normed_TC, weights_TS, experts_TS, self.gate_up_EFC, self.down_ECF)
        if self.shared is not None:
            share_T1 = torch.sigmoid(self._kernels.linear(normed_TC, self.shared_gate_1C, None))
            out_TC = out_TC + share_T1 * self.shared.compute(normed_TC)
        return out_TC if self._group is None else self._kernels.all_reduce(out_TC, self._group)
