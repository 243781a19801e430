"""One file a block: a kind of residual branch that knows nothing of file names or neighbours."""
