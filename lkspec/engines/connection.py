"""HTTP to a server that speaks JSON: requests, tried again while the server is busy, and streamed answers."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

_RETRIED = {429, 500, 502, 503, 504}
_PAUSES = (1.0, 4.0, 16.0)  # seconds before another try


class Connection:
    """A server by its address.

    Args:
        base_url: with or without ``/v1``.
        timeout: seconds that one request may take.
        api_key_variable: environment variable that holds a key, where the server asks for one.

    Raises:
        ValueError: an address that is none.
    """

    def __init__(self, base_url: str | None, *, timeout: float, api_key_variable: str) -> None:
        if base_url is None or not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"engine.base_url: expected the server's address, such as http://localhost:8000, got {base_url!r}"
            )
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._key = os.environ.get(api_key_variable)

    def get(self, path: str) -> str:
        """A page's text.

        Raises:
            ValueError: no server there, or no such page.
        """
        try:
            return self._read(self._request(path))
        except OSError as error:
            raise ValueError(
                f"engine.base_url: {self.root}{path} cannot be read ({error}); is the server up?"
            ) from error

    def post(self, path: str, body: dict[str, Any], what: str) -> Any:
        """The answer to a request, which errors call ``what``; tried again when the server is busy or away.

        Raises:
            ValueError: a request that the server refuses, or that fails again and again.
        """
        for pause in (*_PAUSES, None):
            try:
                return json.loads(self._read(self._request(path, body)))
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED or pause is None:
                    raise self._refusal(what, error) from error
            except (OSError, HTTPException) as error:  # no connection, or none any more
                if pause is None:
                    raise ValueError(f"{self.root}: {what} got no answer ({error}); is the server up?") from error
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def stream(self, path: str, body: dict[str, Any], what: str) -> Iterator[dict[str, Any]]:
        """The server-sent events of an answer as they come; never tried again, as they are timed.

        Raises:
            ValueError: a request that the server refuses or that breaks off.
        """
        try:
            with urllib.request.urlopen(self._request(path, body), timeout=self._timeout) as reply:
                for line in reply:
                    data = line.decode().strip().removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    if data:
                        event: dict[str, Any] = json.loads(data)
                        if "error" in event:
                            raise ValueError(f"{self.root}: {what} broke off: {event['error']}")
                        yield event
        except urllib.error.HTTPError as error:
            raise self._refusal(what, error) from error
        except (OSError, HTTPException) as error:
            raise ValueError(f"{self.root}: {what} broke off ({error})") from error

    def _refusal(self, what: str, error: urllib.error.HTTPError) -> ValueError:
        detail = error.read().decode(errors="replace")[:500]
        return ValueError(f"{self.root}: {what} was refused with {error.code}: {detail}")

    def _read(self, request: urllib.request.Request) -> str:
        with urllib.request.urlopen(request, timeout=self._timeout) as reply:
            text: bytes = reply.read()
            return text.decode()

    def _request(self, path: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.root + path, data=data, headers=headers)
