"""Who may ask: the API key, as OpenAI's clients send it or as Anthropic's do."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from workers.frontend.errors import ApiError


class Keys:
    """The key of a deployment's API."""

    def __init__(self, api_key: str) -> None:
        self._key = api_key.encode()

    def check(self, headers: Mapping[str, str]) -> None:
        """Let a request pass that has the key in its headers (names in lower case).

        Raises:
            ApiError: 401, it has not.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError(
                401, "the API key is missing or wrong: send it as `Authorization: Bearer <key>` or `x-api-key: <key>`"
            )
