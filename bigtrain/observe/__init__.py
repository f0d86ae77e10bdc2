"""What a run shows and records: progress, metrics, TensorBoard, the loss curve."""
