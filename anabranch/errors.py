"""Every error that Anabranch raises on purpose, as one tree.

    AnabranchError
    +-- ConfigError (ValueError)        a configuration key that a user can mend
    +-- InvalidRequest (ValueError)     a field of a request that a client can mend
    |   +-- ContextExceeded             prompt plus answer longer than the context
    +-- ModelError
    |   +-- UnknownModel (ValueError)
    |   +-- UnsupportedArchitecture (ValueError)
    |   +-- CheckpointError             files that are missing, cut short or mislabelled
    |   +-- ChatTemplateError           the model's chat template fails, or takes too long or too much
    +-- CapacityError
    |   +-- OutOfBlocks                 no KV blocks now; later there may be
    |   +-- Overloaded                  the queue is full
    +-- TransportError
    |   +-- FrameTooLarge
    |   +-- MalformedMessage
    |   +-- ChecksumMismatch
    |   +-- StaleLease                  a block's generation or a token's epoch has moved on
    |   +-- PeerLost
    |   +-- TransportUnavailable        the named transport cannot be had here
    +-- AccessDenied                    a secret that must be known was not shown
    +-- DeadlineExceeded                a named wait ran out
    +-- RequestCancelled
    +-- WorkerDied                      the process that held the request ended
    +-- RecoveriesExhausted             worker after worker failed the request
    +-- FfnUnavailable                  no FFN node answered for a layer or an expert in time
    +-- NoWorkers                       no worker of a role that is needed takes requests
    +-- Draining                        the process takes no new work

Each carries `code`, a stable snake-case word that travels on the wire; `error_from_code` turns it back.
"""

from __future__ import annotations

MAX_SHOWN_CHARS = 200


def shown(value: object) -> str:
    """A value as messages show it: what came from outside may be of any size."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a nesting without end
        return f"a very large {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


class AnabranchError(Exception):
    """Base of the tree. `code` is what travels on the wire."""

    code = "internal"


class ConfigError(AnabranchError, ValueError):
    """A configuration value is wrong: names the key, the value and the remedy."""

    code = "config"

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{key}: {shown(value)}: {remedy}")
        self.key = key
        self.value = value
        self.remedy = remedy


class InvalidRequest(AnabranchError, ValueError):
    """A request's field is wrong. The message starts with the field's name."""

    code = "invalid_request"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class ContextExceeded(InvalidRequest):
    code = "context_exceeded"


class ModelError(AnabranchError):
    code = "model"


class UnknownModel(ModelError, ValueError):
    code = "unknown_model"


class UnsupportedArchitecture(ModelError, ValueError):
    code = "unsupported_architecture"


class CheckpointError(ModelError):
    code = "checkpoint"


class ChatTemplateError(ModelError):
    """The model's chat template is broken, at least for these messages; it did not refuse them on purpose."""

    code = "chat_template"


class CapacityError(AnabranchError):
    """There is no room now; later there may be.

    Attributes:
        retry_after_s: when to try again, where that is known.
    """

    code = "capacity"
    retry_after_s: float | None = None


class OutOfBlocks(CapacityError):
    code = "out_of_blocks"


class Overloaded(CapacityError):
    code = "overloaded"


class TransportError(AnabranchError):
    code = "transport"


class FrameTooLarge(TransportError):
    code = "frame_too_large"


class MalformedMessage(TransportError):
    code = "malformed_message"


class ChecksumMismatch(TransportError):
    code = "checksum_mismatch"


class StaleLease(TransportError):
    code = "stale_lease"


class PeerLost(TransportError):
    code = "peer_lost"


class TransportUnavailable(TransportError):
    code = "transport_unavailable"


class AccessDenied(AnabranchError):
    """A caller or a peer has not shown a secret that it must know. The message says where the secret is found."""

    code = "access_denied"


class DeadlineExceeded(AnabranchError):
    """A wait ran out. The message names the wait and its length in seconds."""

    code = "deadline_exceeded"


class RequestCancelled(AnabranchError):
    code = "cancelled"


class WorkerDied(AnabranchError):
    code = "worker_died"


class RecoveriesExhausted(AnabranchError):
    """Worker after worker failed the request; the message names them. Again it may fell more of them."""

    code = "recoveries_exhausted"


class FfnUnavailable(AnabranchError):
    """No FFN node answered for a layer or an expert in time; the message names them."""

    code = "ffn_unavailable"


class NoWorkers(AnabranchError):
    code = "no_workers"


class Draining(AnabranchError):
    code = "draining"


def _tree(root: type[AnabranchError]) -> list[type[AnabranchError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


def error_from_code(code: str, message: str) -> AnabranchError:
    """The error that `code` names, with `message`; an unknown code gives the base class."""
    for kind in _tree(AnabranchError):
        if kind.code == code:
            error = kind.__new__(kind)
            Exception.__init__(error, message)
            return error
    return AnabranchError(message)
