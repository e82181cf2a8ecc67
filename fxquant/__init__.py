"""fxquant: a mixed-precision quantization compiler for PyTorch vision models."""
