"""An engine's member process: the engine itself, the renderer of its answers, and its side of the request plane."""
