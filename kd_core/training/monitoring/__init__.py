"""Reports of a run under way: metrics, TensorBoard, progress, traces, hangs."""
