"""The pictures: the front of a search, its components, the drift of a model; drawn here, written in `files`."""
