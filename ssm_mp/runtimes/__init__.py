"""Other runtimes: a converted model as a file that they open, what each can hold, and what each says of the file."""
