"""One file per protocol: what its frames mean, and how its answers look."""
