"""How a call ends whose client takes nothing any more: with a reset of its stream.

`ServicerContext.abort` does not do it: gRPC sends a status behind the messages before it, and refuses to queue one
while a message waits for the client's window. What gRPC has for this, `grpc_call_cancel_with_status`, is not in
grpc.aio's interface, but in its synchronous one (`cygrpc.Call.cancel`). A context of grpc.aio makes such a `Call` of
itself for a moment, and hands it to a function of its module, whenever it is asked for its peer's identity.
"""

from __future__ import annotations

import logging
from typing import Any

import grpc
import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

_HOOK = "peer_identity_key"


def reset(context: grpc.aio.ServicerContext[Any, Any], status: grpc.StatusCode, details: str) -> bool:
    """End the call's stream at once, whatever waits on it: the client gets the status, and a reset.

    What runs for the call is cancelled by grpc.aio, as it is when the client itself resets the stream.

    Args:
        context: as grpc.aio gave it. To be called on its event loop.

    Returns:
        False where this grpcio has another inside; the call then ends with its connection.
    """
    done: list[bool] = []

    def cancel(call: cygrpc.Call) -> None:
        call.cancel(status.value[0], details)
        done.append(True)

    original = getattr(cygrpc, _HOOK, None)
    setattr(cygrpc, _HOOK, cancel)
    try:
        context.peer_identity_key()
    except (AttributeError, TypeError, ValueError) as error:
        logger.debug("the call was not reset: %s", error)
    finally:
        setattr(cygrpc, _HOOK, original)
    if not done:
        logger.error("grpcio %s cannot reset a call; it lasts as long as its client stays", grpc.__version__)
    return bool(done)
