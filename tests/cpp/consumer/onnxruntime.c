// All that a program takes from ONNX Runtime's library by name.
const void* OrtGetApiBase(void);
const void* OrtGetApiBase(void) {
  return 0;
}
