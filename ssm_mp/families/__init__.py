"""One file a family: how its files are recognised, named and configured, and of which blocks it is made."""
