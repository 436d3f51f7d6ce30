"""How well requests are routed, and what the routing costs: `quality`, `replay`, `cost`; results in docs/routing.md."""
