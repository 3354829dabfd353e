"""The .tflite file: weight table, delta patches, interpreter."""
