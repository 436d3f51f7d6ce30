"""Which key a request has, and whether it may do what it wants with it."""

from __future__ import annotations

from workers.frontend.errors import ApiError
from workers.frontend.http import Request
from workers.runtime.keys import KeyRing, Scope, presented

HOW = {
    Scope.USER: "the API key is missing or wrong: send it as `Authorization: Bearer <key>`",
    Scope.ADMIN: "the admin key is missing or wrong: send it as `Authorization: Bearer <key>`",
}


def authorize(ring: KeyRing, request: Request, scope: Scope) -> None:
    """Let a request with a key of this scope pass; from then on it carries the key's id.

    Raises:
        ApiError: 401 without a valid key; 403 with a user's where an operator's is needed.
    """
    key = ring.find(presented(request.headers))
    if key is not None and key.scope is scope:
        request.key_id = key.id
        return
    if key is not None and scope is Scope.ADMIN:
        raise ApiError(403, "this route needs the admin key (the file admin_key beside api_key), not the API key")
    raise ApiError(401, HOW[scope])


def authorize_any(ring: KeyRing, request: Request) -> None:
    """Let a request with any valid key pass.

    Raises:
        ApiError: 401, it has none.
    """
    key = ring.find(presented(request.headers))
    if key is None:
        raise ApiError(401, HOW[Scope.USER])
    request.key_id = key.id
