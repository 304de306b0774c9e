"""What tells a checkpoint's weights from others' without reading all of them."""

from __future__ import annotations

import hashlib

from anabranch.model.loader import check_finite
from anabranch.model.weights import WeightSource

DIGEST_SAMPLE = 64


def weights_digest(source: WeightSource) -> str:
    """Hash of all names and shapes and of a few values of each tensor outside the experts.

    Raises:
        CheckpointError: a tensor cannot be read, or the values looked at (its first row) are not finite.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(source.names()):
        shape = source.shape(name)
        digest.update(f"{name}{shape}".encode())
        # A mixture of experts has tens of thousands of tensors; names and shapes are enough of those.
        if ".experts." in name or not shape:
            continue
        sample = source.read(name, (slice(0, 1),)) if len(shape) > 1 else source.read(name)
        check_finite(sample, name, source)
        digest.update(sample.flatten()[:DIGEST_SAMPLE].float().numpy().tobytes())
    return digest.hexdigest()
