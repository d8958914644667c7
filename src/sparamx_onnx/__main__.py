"""``python -m sparamx_onnx`` is the command line."""

from sparamx_onnx.cli import main

main()
