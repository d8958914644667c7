"""The operators seen from Python: their definitions, packing through the shared library, references and registration.

Importing this package loads neither the shared library nor onnxruntime; both are loaded when they are first needed.
"""
