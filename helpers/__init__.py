"""What the notebooks share: export, read, explain, compare and time ONNX graphs of Transformers."""
