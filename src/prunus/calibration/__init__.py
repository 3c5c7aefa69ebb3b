"""One pass over calibration data: what is collected, and how batches are taken."""
