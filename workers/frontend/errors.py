"""OpenAI's error shape, for unary answers and streams alike; and Anthropic's, for what its clients call."""

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
    500: "internal_server_error",
}
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """Answer the request with an error.

    Attributes:
        status: HTTP status; also the `code` of the body.
        param: Name of the field that is at fault, where there is one.
        retry_after_s: Told to the client when the same request may succeed later.
        allow: Methods that the path takes, where the one that was sent is not among them.
        more_headers: Further header lines of the answer, each ending in CRLF.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
        more_headers: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
        self.allow = allow
        self.more_headers = more_headers

    def body(self) -> bytes:
        """The JSON body."""
        return error_body(self.status, str(self), self.param)

    def anthropic_body(self) -> bytes:
        """The same as `{"type": "error", "error": {"type", "message"}}`."""
        kind = ANTHROPIC_KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": str(self)}})

    def headers(self) -> bytes:
        """Further header lines."""
        lines = b"" if self.retry_after_s is None else b"Retry-After: %d\r\n" % self.retry_after_s
        lines += b"" if self.allow is None else b"Allow: %b\r\n" % self.allow.encode()
        return lines + self.more_headers


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind = KINDS.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_") + "_error"
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})
