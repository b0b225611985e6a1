"""CARLA street scenes, 23 classes, at 96x128, on an encoder with ImageNet weights (EfficientNet-Lite0).

python -m unet_jax.main --config=configs/carla_pretrained.py --config.data.root=FOLDER_OR_ZIP

Pixel accuracy 0.908, mean IoU 0.309 on 149 frames of six held-out drives, after 11 minutes on 2 CPU cores.
"""

from configs import carla, folder


def get_config():
    config = folder.get_config()
    config.data = carla.get_config().data

    config.model.features = (32, 64, 64, 96, 192)  # the head at stride 1: poles and road lines are a pixel wide
    config.augment = carla.get_config().augment
    config.loss.class_weights = ("sqrt",)
    config.train.epochs = 24.0
    config.train.eval_every_epochs = 3.0
    config.train.checkpoint_every_epochs = 3.0
    return config
