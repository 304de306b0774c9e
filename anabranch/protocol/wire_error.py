"""Our errors as they travel."""

from __future__ import annotations

import msgspec

from anabranch.bounds import MAX_ERROR_CHARS, ErrorText, Name
from anabranch.errors import AnabranchError, error_from_code


class WireError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An AnabranchError on the wire."""

    code: Name
    message: ErrorText

    @classmethod
    def of(cls, error: BaseException) -> WireError:
        code = error.code if isinstance(error, AnabranchError) else AnabranchError.code
        text = str(error) or type(error).__name__
        return cls(code=code, message=text[:MAX_ERROR_CHARS])

    def to_error(self) -> AnabranchError:
        return error_from_code(self.code, self.message)
