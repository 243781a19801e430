"""The pictures of a study: its front, its components, the drift of a model."""
