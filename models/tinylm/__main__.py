"""What `python -m sparamx_onnx.models.tinylm` runs."""

from sparamx_onnx.models.tinylm import main

if __name__ == "__main__":
    main()
