"""A network and a data set so small that a training takes seconds, with everything random enabled."""

from configs import default


def get_config():
    config = default.get_config()
    config.data.size = (48, 48)
    config.data.shapes_train = 20
    config.data.shapes_validation = 10
    config.model.features = (4, 8, 8)
    config.model.dropout = 0.2
    config.augment.flip_horizontal = True
    config.augment.rotate = 20.0
    config.augment.brightness = 0.1
    config.optimizer.ema = 0.9
    config.train.batch_size = 8
    config.train.epochs = 4.0  # 10 steps: an epoch is 2.5
    config.train.eval_every_epochs = 2.0
    config.train.checkpoint_every_epochs = 1.0
    config.train.log_every_steps = 3
    config.train.panels = 1
    return config
