"""Monitoring of a run: metrics, TensorBoard, progress, traces, and detection of hangs."""
