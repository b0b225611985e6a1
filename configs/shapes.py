"""Generated shapes, seven classes at 96x96: needs no data; the quick start of `scripts/train.sh`."""

from configs import default


def get_config():
    config = default.get_config()
    config.augment.flip_horizontal = True
    config.augment.flip_vertical = True
    config.optimizer.learning_rate = 4e-3
    return config
