"""The test of the PyTorch U-Net: six overlapping shapes at 192x192, 100 training and 20 validation images.

Its data, loss (half BCE, half Dice), batch of 25 and 60 epochs; the network is a quarter as wide, normalised.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.variant = "multilabel"
    config.data.size = (192, 192)
    config.data.shapes_train = 100
    config.data.shapes_validation = 20

    config.model.features = (16, 32, 64, 128, 256)

    config.augment.flip_horizontal = True
    config.augment.flip_vertical = True

    config.loss.cross_entropy = 0.5
    config.loss.dice = 0.5
    config.optimizer.learning_rate = 4e-3
    config.train.batch_size = 25
    config.train.epochs = 60.0
    config.train.eval_every_epochs = 5.0
    config.train.checkpoint_every_epochs = 5.0
    return config
