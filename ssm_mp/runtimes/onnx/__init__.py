"""ONNX: the step of one token of any family as a graph, each weight in it by its own codes."""
