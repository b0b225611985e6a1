"""Carvana: cars against background, 1918x1280, at 192x288. All views of a car stay in one split.

python -m unet_jax.main --config=configs/carvana.py --config.data.root=FOLDER

Dice of the car 0.985 on 15 views of three held-out cars (50 to train on), after 9 minutes on 2 CPU cores.

The folder holds train/<car>_<angle>.jpg and train_masks/<car>_<angle>_mask.gif, as the competition's archives unpack.
"""

from configs import folder


def get_config():
    config = folder.get_config()
    config.data.root = "data/carvana"
    config.data.variant = "binary"
    config.data.images = ("train",)
    config.data.masks = ("train_masks",)
    config.data.group = "(.*)_"
    config.data.labels = ("0 background", "1 car")
    config.data.channels = 3
    config.data.size = (192, 288)

    config.model.features = (32, 64, 96, 192)  # the head at stride 2, for the outline
    config.train.epochs = 80.0
    return config
