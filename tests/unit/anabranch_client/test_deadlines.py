"""A deadline that makes no sense is refused, never taken for none given."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from anabranch_client import Admin, AsyncClient, CallFailed, Client, InvalidRequest, Sampling
from anabranch_client.convert import to_generate

pytestmark = pytest.mark.unit

NOWHERE = "127.0.0.1:1"
BAD = [0, 0.0, -1, math.nan, math.inf, -math.inf, 86400.1, 10**5000, True, "5"]


@pytest.mark.parametrize("value", BAD, ids=lambda value: str(value)[:9] if not isinstance(value, int) else "int")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("timeout_s", lambda value: Client(NOWHERE, timeout_s=value)),
        ("call_timeout_s", lambda value: Client(NOWHERE, call_timeout_s=value)),
        ("timeout_s", lambda value: AsyncClient(NOWHERE, timeout_s=value)),
        ("call_timeout_s", lambda value: AsyncClient(NOWHERE, call_timeout_s=value)),
        ("call_timeout_s", lambda value: Admin(NOWHERE, call_timeout_s=value)),
    ],
)
def test_a_client_refuses_it(name: str, make: Callable[[object], object], value: object) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: must be above 0 and at most 86400 seconds"):
        make(value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_a_call_refuses_it(value: float) -> None:
    async def asynchronous() -> None:
        async with AsyncClient(NOWHERE) as client:
            for call in (client.model, client.health):
                with pytest.raises(InvalidRequest, match=r"^timeout_s: "):
                    await call(timeout_s=value)
            with pytest.raises(InvalidRequest, match=r"^timeout_s: "):
                await client.tokenize("x", timeout_s=value)
            with pytest.raises(InvalidRequest, match=r"^timeout_s: "):
                await client.complete("x", timeout_s=value)

    asyncio.run(asynchronous())
    with Client(NOWHERE) as client, Admin(NOWHERE) as admin:
        calls: tuple[Callable[[], object], ...] = (
            lambda: client.model(timeout_s=value),
            lambda: client.health(timeout_s=value),
            lambda: client.tokenize("x", timeout_s=value),
            lambda: client.generate("x", timeout_s=value),
            lambda: client.complete("x", timeout_s=value),
            lambda: admin.cluster(timeout_s=value),
            lambda: admin.report_exit("w", 1, "how", timeout_s=value),
            lambda: admin.drain("w", timeout_s=value),
        )
        for call in calls:
            with pytest.raises(InvalidRequest, match=r"^timeout_s: "):
                call()


def test_what_makes_sense_is_taken() -> None:
    with Client(NOWHERE, timeout_s=86400, call_timeout_s=1e-3) as client, pytest.raises(CallFailed):
        client.health(timeout_s=0.5)


@pytest.mark.parametrize("endpoint", ["", "\udcff:1", "a\0b:1", "a\x1b[31m:1", "a\n:1", "a" * 1025])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    for make in (Client, AsyncClient, Admin):
        with pytest.raises(InvalidRequest, match=r"^endpoint: ") as caught:
            make(endpoint)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 10**400), ("seed", 2**63), ("max_tokens", 10**400), ("logit_bias", {1: 10**400})],
)
def test_a_number_that_the_message_cannot_hold_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        to_generate("x", Sampling(**{field: value}))  # type: ignore[arg-type]
