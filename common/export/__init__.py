"""A checkpoint -> files that run without this project: ONNX and OpenVINO; and a folder for the hub."""
