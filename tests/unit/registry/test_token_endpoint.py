"""What test_control.py, which logs in, doesn't try."""

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from chandlery.errors import CredentialsError
from chandlery.registry.token_endpoint import _body


async def test_a_form_that_never_ends_holds_no_connection() -> None:
    first = [{"type": "http.request", "body": b"grant_type=", "more_body": True}]

    async def receive() -> Message:
        if first:
            return first.pop()
        await asyncio.Event().wait()
        raise AssertionError

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(CredentialsError, match="has not come in time"):
        await _body(request, 0.01)
