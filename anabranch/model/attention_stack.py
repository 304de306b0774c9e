"""The first halves of all layers on one rank, with what comes before the first and after the last.

Shape suffixes: T new tokens of all sequences, S sampled rows, C hidden, R rotary dim, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch

from anabranch.kernels.base import Kernels
from anabranch.model.attention import Attention
from anabranch.model.attention_half import AttentionHalf
from anabranch.model.embedding import Embedding, LmHead, load_vocabulary
from anabranch.model.ffn_half import FfnCall, FfnCalls
from anabranch.model.loader import WeightLoader
from anabranch.model.rotary import Rotary
from anabranch.model.shared_expert import SharedExpert, has_shared_expert
from anabranch.model.tied_head import EMBEDDING, LM_HEAD
from anabranch.parallel.group import Group


class AttentionStack:
    """Embedding, attention halves, final norm and LM head; the weights of one rank.

    Args:
        loader: only this rank's slices of these tensors are read.
        group: ranks that the weights are sharded over.
        shared_expert: where the chosen experts are elsewhere, who has the shared ones: attn (they are here, and are
            computed meanwhile), or ffn (their gates are here, and choose them too). None: the FFN half has both.

    Attributes:
        shared_experts: per layer; None where there is none here.
    """

    def __init__(
        self,
        loader: WeightLoader,
        kernels: Kernels,
        group: Group,
        *,
        shared_expert: Literal["attn", "ffn"] | None = None,
    ) -> None:
        config = loader.config
        self.config = config
        self.dtype = loader.dtype
        self.device = loader.device
        tied = config.tie_embeddings
        # Of a tied pair, a checkpoint may store either.
        stored = LM_HEAD if tied and loader.has(LM_HEAD) and not loader.has(EMBEDDING) else EMBEDDING
        embedding_VC = load_vocabulary(loader, group, stored)
        self.embedding = Embedding(embedding_VC, group)
        loader.part_done()
        self.layers: list[AttentionHalf] = []
        self.shared_experts: list[SharedExpert | None] = []
        for layer in range(config.num_layers):
            self.layers.append(AttentionHalf(loader, kernels, group, layer, shared=shared_expert == "ffn"))
            with_shared = shared_expert == "attn" and has_shared_expert(loader, layer)
            self.shared_experts.append(SharedExpert(loader, kernels, group, layer) if with_shared else None)
            loader.part_done()
        self.norm_C = loader.whole("model.norm.weight", config.hidden_size)
        head_VC = embedding_VC if tied else load_vocabulary(loader, group, LM_HEAD)
        self.lm_head = LmHead(head_VC, kernels, group, config.vocab_size)
        self.rotary = Rotary(config.rope, loader.device)
        self._kernels = kernels
        loader.part_done()

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attention: Attention,
        sample_rows_S: torch.Tensor,
    ) -> FfnCalls[torch.Tensor]:
        """One pass over a ragged batch; `FfnCalls` says what it asks for on its way.

        Args:
            token_ids_T: int64.
            positions_T: int64, each token's position in its sequence.
            attention: keeps K and V; knows which rows belong to which sequence.
            sample_rows_S: int64, rows whose logits are wanted.

        Returns:
            `[S, V]`, the logits of this rank's share of the vocabulary (`LmHead.share`).
        """
        angles = self.rotary.forward(positions_T)
        hidden_TC, answer_TC = yield from self._layers(self.embed(token_ids_T), *angles, attention)
        return self.logits(hidden_TC.index_select(0, sample_rows_S), answer_TC.index_select(0, sample_rows_S))

    def decode(
        self, hidden_TC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, attention: Attention
    ) -> FfnCalls[torch.Tensor]:
        """`forward` of embedded rows that are all sampled, by calls of kernels alone: what is recorded."""
        return self.logits(*(yield from self._layers(hidden_TC, cos_TR, sin_TR, attention)))

    def _layers(
        self, hidden_TC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, attention: Attention
    ) -> FfnCalls[tuple[torch.Tensor, torch.Tensor]]:
        """All layers: the hidden states, and the last FFN's answer that is still to be added."""
        answer_TC: torch.Tensor | None = None
        for layer, half in enumerate(self.layers):
            hidden_TC, normed_TC = half.step(hidden_TC, answer_TC, cos_TR, sin_TR, attention)
            answer_TC = yield FfnCall(layer, half.choose(normed_TC))
        assert answer_TC is not None
        return hidden_TC, answer_TC

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """`[T] int64 -> [T, C]`."""
        return self.embedding.forward(token_ids_T)

    def logits(self, hidden_SC: torch.Tensor, answer_SC: torch.Tensor) -> torch.Tensor:
        """Residual of the last FFN, final norm and LM head: `[S, C]` twice `-> [S, this rank's share of V]`."""
        if not hidden_SC.shape[0]:
            return hidden_SC.new_empty((0, self.lm_head.weight_VC.shape[0]))
        _, normed_SC = self._kernels.add_rms_norm(answer_SC, hidden_SC, self.norm_C, self.config.rms_eps)
        return self.lm_head.share(normed_SC)
