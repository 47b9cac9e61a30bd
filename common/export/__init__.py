"""A checkpoint -> files that run without this project: ONNX and OpenVINO."""
