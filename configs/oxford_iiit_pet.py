"""Oxford-IIIT Pet: trimaps of three classes at 128x128, on an encoder with ImageNet weights (EfficientNet-Lite0).

python -m unet_jax.main --config=configs/oxford_iiit_pet.py

Score and time: not measured.

Downloads 800 MB, or reads the archives images.tar.gz and annotations.tar.gz from --config.data.root=FOLDER. For two
classes, pet and background: --config.data.variant=binary.
"""

from configs import default, folder


def get_config():
    config = folder.get_config()
    config.data = default.get_config().data
    config.data.name = "oxford_iiit_pet"
    config.data.variant = "trimap"
    config.data.size = (128, 128)
    config.data.validation = 0.1

    config.train.batch_size = 32
    config.train.epochs = 60.0
    config.train.eval_every_epochs = 2.0
    config.train.checkpoint_every_epochs = 1.0
    return config
