"""OpenAI's error shape, for unary answers and streams alike."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """Answer the request with an error.

    Attributes:
        status: HTTP status; also the `code` of the body.
        param: Name of the field that is at fault, where there is one.
        retry_after_s: Told to the client when the same request may succeed later.
        more_headers: Further header lines of the answer, each ending in CRLF.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        retry_after_s: int | None = None,
        more_headers: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
        self.more_headers = more_headers

    def body(self) -> bytes:
        """The JSON body."""
        return error_body(self.status, str(self), self.param)

    def headers(self) -> bytes:
        """Further header lines."""
        retry = b"" if self.retry_after_s is None else b"Retry-After: %d\r\n" % self.retry_after_s
        return retry + self.more_headers


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind = KINDS.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_") + "_error"
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})
