"""Quick start: generated shapes, seven classes at 96x96. Needs no data.

scripts/train.sh          or: python -m unet_jax.main --config=configs/shapes.py

Mean IoU 0.921 on 100 validation images and 0.910 on 100 test images, after 4 minutes on 2 CPU cores.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.augment.flip_horizontal = True
    config.augment.flip_vertical = True
    config.optimizer.learning_rate = 4e-3
    return config
