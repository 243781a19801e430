"""A search from begin to end: prepared, worked on by one process or many, launched, watched, widened, finished."""
