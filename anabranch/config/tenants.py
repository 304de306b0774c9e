"""Which tenants are served more or less than others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from anabranch.config.bounds import Text
from anabranch.errors import ConfigError

TenantWeights = Annotated[tuple[str, ...], Text(256)]

MAX_WEIGHTS = 1024
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
# As a request may name a tenant, but for the comma between two entries of a flag.
_ENTRY = re.compile(r"([!-+\--~]{1,128})=([0-9]{1,4}(?:\.[0-9]{1,6})?)")


def parse_tenant_weights(entries: Sequence[str]) -> Mapping[str, float]:
    """Tenants' weights from entries such as `gold=3`. Raises ConfigError."""
    if len(entries) > MAX_WEIGHTS:
        raise ConfigError("tenant_weights", len(entries), f"names more than {MAX_WEIGHTS} tenants; weigh fewer")
    weights: dict[str, float] = {}
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        weight = float(match[2]) if match else 0.0
        if match is None or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(
                "tenant_weights",
                entry,
                f"give NAME=WEIGHT, such as gold=3: 1 to 128 printable ASCII characters without spaces and commas, "
                f"and a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}",
            )
        if match[1] in weights:
            raise ConfigError("tenant_weights", entry, "names a tenant twice; keep one")
        weights[match[1]] = weight
    return weights
