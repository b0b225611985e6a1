"""Weights in from PyTorch and Keras; StableHLO, ONNX and safetensors out."""
