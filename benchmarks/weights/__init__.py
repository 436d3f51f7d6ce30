"""How long staging takes when the shared file system is the bottleneck."""
