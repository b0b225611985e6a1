"""CARLA street scenes, 23 classes, at 96x128, on an encoder with ImageNet weights (EfficientNet-Lite0).

python -m unet_jax.main --config=configs/carla_pretrained.py --config.data.root=FOLDER_OR_ZIP

Pixel accuracy 0.910, mean IoU 0.272 on 149 frames of six held-out drives, after 9 minutes on 2 CPU cores.
"""

from configs import carla, folder


def get_config():
    config = folder.get_config()
    config.data = carla.get_config().data

    config.augment = carla.get_config().augment
    config.train.batch_size = 8
    config.train.epochs = 36.0
    config.train.eval_every_epochs = 3.0
    config.train.checkpoint_every_epochs = 3.0
    return config
