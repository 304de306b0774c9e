"""Scripts that a peer's own python runs; they import the peer and the standard library alone."""
