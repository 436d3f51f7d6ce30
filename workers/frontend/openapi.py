"""A document of the routes in OpenAPI 3.1, made from the table that answers them and the types that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from workers.frontend.routes import Access, Route

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def document(routes: Iterable[Route]) -> bytes:
    """The document as JSON."""
    routes = tuple(routes)
    bodies = list(dict.fromkeys(route.body for route in routes if route.body))
    schemas, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    body_of = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, body_of)
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": "1", "description": "An OpenAI- and Anthropic-compatible model server."},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": ERROR, "AnthropicError": ANTHROPIC_ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }
    return msgspec.json.encode(whole)


def _operation(route: Route, body_of: dict[type[msgspec.Struct], Any]) -> dict[str, Any]:
    shape = "AnthropicError" if route.anthropic else "Error"
    error = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}}
    contents: dict[str, Any] = {route.content: {"schema": {}}} | (
        {"text/event-stream": {"schema": {}}} if route.streams else {}
    )
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{route.path.translate(str.maketrans('/{}.', '____'))}",
        "responses": {
            "200": {"description": "The answer", "content": contents},
            "4XX": {"description": "The request was refused", **error},
            "503": {
                "description": "Nothing is there that could answer",
                "content": {"application/json": {"schema": {}}},
            },
        },
        "security": [] if route.access is Access.OPEN else [{"bearer": []}, {"header": []}],
    }
    where = [{"name": name, "in": "path", "required": True, "schema": _text()} for name in route.parameters]
    asked = [{"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in route.query]
    if where or asked:
        operation["parameters"] = [*where, *asked]
    if route.body:
        content = {"application/json": {"schema": body_of[route.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    elif route.form:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": route.form}}}
    return operation


def _text() -> dict[str, Any]:
    return {"type": "string", "minLength": 1}
