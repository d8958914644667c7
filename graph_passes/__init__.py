"""The rewrites that turn the linear layers of an ONNX model into sparse operators: one pass a file.

``pipeline.run`` applies them in order and returns the plan; ``write.save`` streams the result to disk.
"""
