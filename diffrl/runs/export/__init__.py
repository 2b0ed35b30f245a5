"""A trained policy as a folder of its own, for others: a model card, its weights, its configuration, an ONNX graph."""
