"""Whether UCX can be used here, and what to do where it cannot."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from transport.ucx import api, trial

INSTALL = "pip install 'anabranch[ucx-cu12]' (or ucx-cu13, to match the machine's CUDA; no GPU is needed)"


@dataclass(frozen=True, kw_only=True)
class UcxStatus:
    """What was found.

    Attributes:
        reason: why it cannot be used; empty where it can.
        remedy: what to do about it.
        detail: versions and transports, for people.
        broken: it is installed, and does not work.
    """

    reason: str = ""
    remedy: str = ""
    detail: str = ""
    broken: bool = False


def ucx_status(listen_host: str, option: str) -> UcxStatus:
    """UCX for an end that listens there; it is tried once in a process.

    Args:
        option: the one that asks for UCX, for the remedy.
    """
    if importlib.util.find_spec("ucxx") is None:
        return UcxStatus(reason="the package ucxx is not installed", remedy=INSTALL)
    try:
        detail = api.describe()
        reason = trial.failure(api.transports_for(listen_host))
    except Exception as error:  # a broken UCX install fails in many ways; all of them mean: not usable
        return UcxStatus(reason=f"ucxx does not start: {error}", remedy=f"reinstall: {INSTALL}")
    if reason:
        return UcxStatus(reason=reason, remedy=trial.shm_remedy(option), broken=True)
    return UcxStatus(detail=detail)
