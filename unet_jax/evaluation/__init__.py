"""What a training is worth: scores of a split, pictures, curves, the report, and a check of the images beforehand."""
