"""From images to probabilities: a trained network from its work directory, the one forward pass, tiles, files."""
