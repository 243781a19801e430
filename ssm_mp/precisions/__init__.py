"""How a tensor is stored and read: one file a precision or what they share."""
