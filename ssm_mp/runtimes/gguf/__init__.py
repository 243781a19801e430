"""GGUF, the file of llama.cpp: tensors, keys and tokenizer out of a converted model, and llama.cpp asked about them."""
