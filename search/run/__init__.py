"""A search from begin to end: prepare, claim, work, launch, watch, finish, pick."""
