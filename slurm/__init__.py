"""Where it runs: submission, the agent of a node, its ports, addresses and child processes."""
