"""Robot data: RLDS files to batches, images, text, statistics. Knows numpy and tensorflow, and no model."""
