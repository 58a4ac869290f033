"""The training of a DETR: losses, batches, the loop and its folder."""
