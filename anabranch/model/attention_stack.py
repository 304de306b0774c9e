"""The first halves of all layers on one rank, with what comes before the first and after the last.

Shape suffixes: T new tokens of all sequences, S sampled rows, C hidden, V vocabulary.
"""

from __future__ import annotations

import torch

from anabranch.kernels.base import Kernels
from anabranch.model.attention_half import AttentionHalf
from anabranch.model.embedding import Embedding, LmHead, load_vocabulary
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
        shared_experts: whether these belong here: where the chosen experts are elsewhere, they are computed meanwhile.

    Attributes:
        shared_experts: per layer; None where there is none, or it belongs to the FFN half.
    """

    def __init__(self, loader: WeightLoader, kernels: Kernels, group: Group, *, shared_experts: bool = False) -> None:
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
            self.layers.append(AttentionHalf(loader, kernels, group, layer))
            with_shared = shared_experts and has_shared_expert(loader, layer)
            self.shared_experts.append(SharedExpert(loader, kernels, group, layer) if with_shared else None)
            loader.part_done()
        self.norm_C = loader.whole("model.norm.weight", config.hidden_size)
        head_VC = embedding_VC if tied else load_vocabulary(loader, group, LM_HEAD)
        self.lm_head = LmHead(head_VC, kernels, group, config.vocab_size)
        self.rotary = Rotary(config.rope, loader.device)
        self._kernels = kernels
        loader.part_done()

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """`[T] int64 -> [T, C]`."""
        return self.embedding.forward(token_ids_T)

    def logits(self, hidden_SC: torch.Tensor, answer_SC: torch.Tensor) -> torch.Tensor:
        """Residual of the last FFN, final norm and LM head: `[S, C]` twice `-> [S, this rank's share of V]`."""
        if not hidden_SC.shape[0]:
            return hidden_SC.new_empty((0, self.lm_head.weight_VC.shape[0]))
        _, normed_SC = self._kernels.add_rms_norm(answer_SC, hidden_SC, self.norm_C, self.config.rms_eps)
        return self.lm_head.share(normed_SC)
