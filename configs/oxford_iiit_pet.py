"""Oxford-IIIT Pet: trimaps of three classes at 128x128, a U-Net of 32..512 with batch normalisation.

python -m unet_jax.main --config=configs/oxford_iiit_pet.py

Score and time: not measured.

Downloads 800 MB, or reads the archives images.tar.gz and annotations.tar.gz from --config.data.root=FOLDER. For two
classes, pet and background: --config.data.variant=binary.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "oxford_iiit_pet"
    config.data.variant = "trimap"
    config.data.size = (128, 128)
    config.data.validation = 0.1

    config.model.features = (32, 64, 128, 256, 512)

    config.augment.flip_horizontal = True
    config.augment.rotate = 10.0
    config.augment.scale = 0.2
    config.augment.brightness = 0.1
    config.augment.contrast = 0.2

    config.optimizer.warmup_epochs = 1.0
    config.train.batch_size = 32
    config.train.epochs = 60.0
    config.train.eval_every_epochs = 2.0
    return config
