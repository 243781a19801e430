"""Folders in the pack-quantized format of compressed-tensors, which transformers and vLLM open."""
