"""A decoder-only transformer of one tensor-parallel rank.

Shape suffixes: T new tokens of all sequences, S sampled rows, C hidden, D head dim, V vocabulary.
"""

from __future__ import annotations

import torch

from anabranch.kernels.base import Kernels
from anabranch.model.attention import Attention
from anabranch.model.attention_half import AttentionHalf
from anabranch.model.config import ModelConfig
from anabranch.model.embedding import Embedding, LmHead, load_vocabulary
from anabranch.model.ffn_half import DenseFfn, FfnHalf
from anabranch.model.loader import Progress, WeightLoader
from anabranch.model.moe import MoeFfn
from anabranch.model.rotary import Rotary
from anabranch.model.tied_head import EMBEDDING, LM_HEAD
from anabranch.model.weights import WeightSource
from anabranch.parallel.group import Group
from anabranch.parallel.split import check_tp


def load_ffn(loader: WeightLoader, kernels: Kernels, group: Group, layer: int) -> FfnHalf:
    """The FFN half of a layer, dense or sparse."""
    config = loader.config
    if config.is_sparse(layer):
        return MoeFfn(loader, kernels, group, layer)
    prefix = f"model.layers.{layer}.mlp"
    return DenseFfn(loader, kernels, group, prefix, config.intermediate_size, bias=config.mlp_bias)


class DecoderLayer:
    """Both halves of a layer, joined by a function call: what a split pair does over the network.

    `Transformer.forward` does the same with `AttentionHalf.step`, which saves passes over memory.
    """

    def __init__(self, attention: AttentionHalf, ffn: FfnHalf) -> None:
        self.attention = attention
        self.ffn = ffn

    def forward(
        self, hidden_TC: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """`[T, C] -> [T, C]`."""
        hidden_TC = self.attention.forward(hidden_TC, cos_TD, sin_TD, attention)
        return hidden_TC + self.ffn.forward(self.attention.route(hidden_TC))


class Transformer:
    """Weights of one rank and the forward pass over them.

    Args:
        source: checkpoint; only this rank's slices are read.
        dtype: of weights and activations.
        kernels: what the layers compute with.
        group: ranks that the layers are sharded over.
        progress: told of each part loaded: embedding, layers, head.

    Raises:
        ConfigError: the group is larger than the model can be cut.
        CheckpointError: the checkpoint is broken or contradicts the configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        group: Group,
        progress: Progress | None = None,
    ) -> None:
        check_tp(group.size, config.num_heads, smallest_ffn(config))
        num_parts = config.num_layers + 2
        tell = progress or (lambda done, total: None)
        loader = WeightLoader(config, source, dtype, device)
        self.config = config
        self.dtype = dtype
        self.device = device
        tied = config.tie_embeddings
        # Of a tied pair, a checkpoint may store either.
        stored = LM_HEAD if tied and loader.has(LM_HEAD) and not loader.has(EMBEDDING) else EMBEDDING
        embedding_VC = load_vocabulary(loader, group, stored)
        self.embedding = Embedding(embedding_VC, group)
        tell(1, num_parts)
        self.layers: list[DecoderLayer] = []
        for layer in range(config.num_layers):
            attention = AttentionHalf(loader, kernels, group, layer)
            self.layers.append(DecoderLayer(attention, load_ffn(loader, kernels, group, layer)))
            tell(layer + 2, num_parts)
        self.norm_C = loader.whole("model.norm.weight", config.hidden_size)
        head_VC = embedding_VC if tied else load_vocabulary(loader, group, LM_HEAD)
        self.lm_head = LmHead(head_VC, kernels, group, config.vocab_size)
        self.rotary = Rotary(config.rope, device)
        self._kernels = kernels
        loader.finish()
        tell(num_parts, num_parts)

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attention: Attention,
        sample_rows_S: torch.Tensor,
    ) -> torch.Tensor:
        """One pass over a ragged batch.

        Args:
            token_ids_T: int64.
            positions_T: int64, each token's position in its sequence.
            attention: keeps K and V; knows which rows belong to which sequence.
            sample_rows_S: int64, rows whose logits are wanted.

        Returns:
            `[S, V]` float32, the same on every rank.
        """
        return self.lm_head.gather(self.forward_share(token_ids_T, positions_T, attention, sample_rows_S))

    @torch.inference_mode()
    def forward_share(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attention: Attention,
        sample_rows_S: torch.Tensor,
    ) -> torch.Tensor:
        """See `forward`; returns the logits of this rank's share of the vocabulary (`LmHead.share`)."""
        hidden_TC, answer_TC = self._layers(self.embed(token_ids_T), *self.rotary.forward(positions_T), attention)
        return self.logits(hidden_TC.index_select(0, sample_rows_S) + answer_TC.index_select(0, sample_rows_S))

    @torch.inference_mode()
    def decode(
        self, hidden_TC: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """`forward_share` of embedded rows that are all sampled, by calls of kernels alone: what is recorded."""
        hidden_TC, answer_TC = self._layers(hidden_TC, cos_TD, sin_TD, attention)
        _, normed_TC = self._kernels.add_rms_norm(answer_TC, hidden_TC, self.norm_C, self.config.rms_eps)
        return self.lm_head.share(normed_TC)

    def _layers(
        self, hidden_TC: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers: the hidden states, and the last FFN's answer that is still to be added."""
        answer_TC: torch.Tensor | None = None
        for layer in self.layers:
            hidden_TC, rows = layer.attention.step(hidden_TC, answer_TC, cos_TD, sin_TD, attention)
            answer_TC = layer.ffn.forward(rows)
        assert answer_TC is not None
        return hidden_TC, answer_TC

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """`[T] int64 -> [T, C]`."""
        return self.embedding.forward(token_ids_T)

    def logits(self, hidden_SC: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head: `[S, C] -> [S, share]`."""
        if not hidden_SC.shape[0]:
            return hidden_SC.new_empty((0, self.lm_head.weight_VC.shape[0]))
        return self.lm_head.share(self._kernels.rms_norm(hidden_SC, self.norm_C, self.config.rms_eps))


def smallest_ffn(config: ModelConfig) -> int:
    """Features of the narrowest FFN or expert: the most ranks that it can be cut among."""
    if config.moe is None:
        return config.intermediate_size
    widths = [config.moe.expert_intermediate, config.moe.shared_expert_intermediate or config.moe.expert_intermediate]
    if not all(config.moe.sparse_layers):
        widths.append(config.intermediate_size)
    return min(widths)
