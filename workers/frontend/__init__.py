"""The OpenAI-compatible HTTP server: validate, tokenize, route, and relay the bytes that workers render."""
