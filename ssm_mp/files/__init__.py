"""Files as people have them, read without being understood: nested values, their config, what is refused."""
